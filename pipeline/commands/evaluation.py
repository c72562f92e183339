"""The verbs for results: eval and report."""

import argparse
from pathlib import Path
from typing import Any

from retemper.pipeline.commands.options import RUN, add_group, add_verb, announce_loading, positive
from retemper.pipeline.errors import UserError


def add_to(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    examples = [
        "retemper eval run runs/demo/full",
        "retemper eval worker runs/paper/lora evals=paper evals.tasks_dir=tasks/",
        "retemper eval show runs/paper/lora",
    ]
    evals = add_group(verbs, "eval", "Evaluate a run's checkpoints, or show scores.", examples)
    group = evals.add_subparsers(required=True, metavar="VERB")
    add_verb(
        group,
        "run",
        _run,
        "Evaluate the initial model and all checkpoints that have no scores yet, "
        "in the run's parallel layout or another.",
        [
            "retemper eval run runs/demo/full",
            "retemper eval run runs/demo/full evals=quick evals.tasks_dir=tasks/",
            "retemper eval run runs/demo/full parallel=dp2",
        ],
        positionals=RUN,
        keys="overrides of the run's config: evals, parallel, and the current locations of "
        "its files (data.path, init_from)",
    )
    _add_worker(group)
    add_verb(
        group,
        "show",
        _show,
        "Print the scores so far, with the difference from the step-0 model.",
        examples[2:],
        positionals=RUN,
        keys=None,
    )
    add_verb(
        verbs,
        "report",
        _report,
        "Compare the runs of a study: print a table, and write report.html and PNG figures.",
        ["retemper report runs/demo"],
        positionals={"study": "folder of the study, i.e. runs_dir/study"},
        keys=None,
    )


def _add_worker(group: Any) -> None:
    verb = add_verb(
        group,
        "worker",
        _worker,
        "Evaluate a run's checkpoints as they appear, on the tasks with where=worker, "
        "alongside other workers and the training, until the run is complete.",
        [
            "retemper eval worker runs/paper/lora evals=paper evals.tasks_dir=tasks/",
            "retemper eval worker runs/paper/lora --only score",
        ],
        positionals=RUN,
        keys="overrides of the run's config: evals, and the current locations of its files "
        "(data.path, data.tokenizer)",
    )
    verb.add_argument(
        "--once", action="store_true", help="evaluate existing checkpoints, then exit"
    )
    verb.add_argument(
        "--only",
        choices=("generate", "score"),
        help="do one part of the work, so that generated programs can run on another machine",
    )
    verb.add_argument(
        "--poll",
        type=positive(float),
        default=30,
        metavar="SECONDS",
        help="interval between checks for new checkpoints (default: 30)",
    )
    verb.add_argument(
        "--lease",
        type=positive(float),
        default=120,
        metavar="SECONDS",
        help="time after which the job of a dead worker is taken over (default: 120)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.existing_run import SCORING_OVERRIDES, load_run

    config = load_run(Path(arguments.run), arguments.keys, SCORING_OVERRIDES)
    announce_loading("torch and megatron-core")
    from retemper.launch.local import run_here
    from retemper.pipeline.entry.preflight import preflight

    preflight(config)
    return run_here(
        "retemper.pipeline.evals", [arguments.run, *arguments.keys], config.parallel.world_size
    )


def _worker(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.existing_run import WORKER_OVERRIDES, load_run
    from retemper.pipeline.evals.worker import PARTS, Worker

    config = load_run(Path(arguments.run), arguments.keys, WORKER_OVERRIDES)
    if not config.evals.worker_tasks:
        raise UserError(
            f"{arguments.run} has no tasks for workers: "
            "set evals=paper, or evals.tasks.humaneval.where=worker"
        )
    announce_loading("lm-eval and transformers")
    worker = Worker(config, (arguments.only,) if arguments.only else PARTS, arguments.lease)
    worker.work(None if arguments.once else arguments.poll)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.existing_run import load_run
    from retemper.pipeline.evals.show_scores import table

    print("\n".join(table(load_run(Path(arguments.run), []))))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    announce_loading("matplotlib and scipy")
    from retemper.pipeline.report.page import report

    print(report(Path(arguments.study)))
    return 0
