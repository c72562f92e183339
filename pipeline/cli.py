"""The command `retemper`.

Heavy imports happen inside the verb that needs them, so that --help answers at once.
"""

import argparse
import sys
from pathlib import Path

from retemper.pipeline.errors import UserError

_OVERRIDES = (
    "config keys as key=value, and presets as group=name with the groups run, model, data, "
    "method, parallel, optimizer, schedule and evals"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command of `retemper`.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 1 for bad input or a failed run, 130 after Ctrl-C.
    """
    arguments = _parse(argv)
    try:
        return arguments.verb(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to resume.", file=sys.stderr)
        return 130
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{file}; completed work is kept", file=sys.stderr)
        return 1


def _tokenize(arguments) -> int:
    from retemper.pipeline.config.compose import load_data_config
    from retemper.pipeline.corpus.manifest import describe_near_duplicates
    from retemper.tokenize.job import tokenize

    data = load_data_config(arguments.overrides)
    manifest = tokenize(data)
    if manifest is None:
        print(
            "Submitted to Slurm (see `squeue --me`). "
            "Run the same command again to check the result or to resume."
        )
        return 0
    for split, counts in manifest["splits"].items():
        print(
            f"{data.path}/{split}: {counts['samples']:,} samples, {counts['tokens']:,} tokens "
            f"from {counts['documents']:,} documents "
            f"({counts['padding_fraction']:.2%} padding, "
            f"{counts['cut_documents_fraction']:.1%} of the documents cut)"
        )
    dropped = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest["dropped"].items()
    )
    print(f"{manifest['documents_read']:,} documents read; dropped: {dropped or 'none'}")
    if line := describe_near_duplicates(manifest):
        print(line)
    reason = manifest["encoder"].get("reason")
    print(f"encoded by {manifest['encoder']['name']}{f': {reason}' if reason else ''}")
    for file in manifest["broken_files"]:
        print(f"damaged: {file['file']} ({file['error']}; {file['records_read']:,} records read)")
    return 0


def _train(arguments) -> int:
    from retemper.pipeline.config.compose import load_config

    return _launch_here(
        "retemper.pipeline.train", load_config(arguments.overrides), arguments.overrides
    )


def _eval(arguments) -> int:
    from retemper.pipeline.config.existing_run import OF_SCORING, load_run

    config = load_run(Path(arguments.run), arguments.overrides, OF_SCORING)
    return _launch_here("retemper.pipeline.evals", config, [arguments.run, *arguments.overrides])


def _import(arguments) -> int:
    import json

    from retemper.launch.torchrun import run_here
    from retemper.pipeline.config.compose import load_parallel
    from retemper.pipeline.config.validate import check_setup
    from retemper.pipeline.huggingface.source_config import (
        model_of,
        read_config,
        transformers_folder,
    )
    from retemper.pipeline.schema.model import MethodConfig, ModelSetup

    parallel = load_parallel(arguments.overrides)
    _refuse_existing(arguments.run)
    # Check all that config.json determines before any rank starts: the ranks then read the rest.
    folder = transformers_folder(arguments.folder, arguments.folder)
    check_setup(
        ModelSetup(
            model=model_of(read_config(folder), folder),
            method=MethodConfig(name="full"),
            parallel=parallel,
        )
    )
    options = {name: getattr(arguments, name) for name in ("run", "trust", "overrides")}
    options |= {
        "folder": str(folder),
        "name": None if Path(arguments.folder).exists() else arguments.folder,
    }
    return run_here(
        "retemper.pipeline.huggingface", ["import", json.dumps(options)], parallel.world_size
    )


def _export(arguments) -> int:
    import json

    from retemper.launch.torchrun import run_here

    _refuse_existing(arguments.folder)
    if arguments.base and not arguments.adapter:
        raise UserError(
            "--base requires --adapter: an exported model already contains the weights of its base"
        )
    options = {
        name: getattr(arguments, name)
        for name in ("run", "folder", "step", "adapter", "base", "tokenizer")
    }
    return run_here("retemper.pipeline.huggingface", ["export", json.dumps(options)], 1)


def _refuse_existing(target: str) -> None:
    if Path(target).exists():
        raise UserError(f"{target} exists already: remove it, or choose another folder")


def _launch_here(module: str, config, arguments: list[str]) -> int:
    from retemper.launch.torchrun import run_here
    from retemper.pipeline.entry.preflight import preflight

    preflight(config)
    return run_here(module, arguments, config.parallel.world_size)


def _evals(arguments) -> int:
    from retemper.pipeline.config.existing_run import load_run

    config = load_run(Path(arguments.run), arguments.overrides)
    if arguments.action == "show":
        from retemper.pipeline.evals.show_scores import table

        print("\n".join(table(config)))
        return 0
    from retemper.pipeline.evals.worker import PARTS, Worker

    if not config.evals.of_workers:
        raise UserError(
            f"{arguments.run} has no tasks for workers: "
            "set evals=paper, or evals.tasks.humaneval.where=worker"
        )
    worker = Worker(config, (arguments.only,) if arguments.only else PARTS, arguments.lease)
    worker.work(None if arguments.once else arguments.poll)
    return 0


def _report(arguments) -> int:
    from retemper.pipeline.report.page import write_report

    print(write_report(Path(arguments.study)))
    return 0


def _data(arguments) -> int:
    from retemper.pipeline.checkpoint.state import newest_state
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.data.streams import check_corpora

    options = {"step": None, "samples": 4}
    overrides = []
    for text in arguments.overrides:
        key, _, value = text.partition("=")
        if key not in options:
            overrides.append(text)
        elif not value.isdigit():
            raise UserError(f"{text}: {key} must be a whole number")
        else:
            options[key] = int(value)
    if arguments.action == "show" and options["step"] is None:
        raise UserError("step is required, counted from 1: set step=12")
    config = load_config(overrides)
    check_corpora(config)
    began_at = newest_state(config.run_dir).data_began_at
    if arguments.action == "verify":
        from retemper.pipeline.data.ledger import verify

        print(verify(config, began_at))
        return 0
    from retemper.pipeline.data.show import show_step

    for line in show_step(config, began_at, **options, colours=sys.stdout.isatty()):
        print(line)
    return 0


def _demo(arguments) -> int:
    from retemper.pipeline.study.demo import run_demo

    return run_demo(arguments.overrides)


def _config(arguments) -> int:
    from retemper.pipeline.config.compose import load_config, to_yaml

    print(to_yaml(load_config(arguments.overrides)), end="")
    return 0


def _plan(arguments) -> int:
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.estimate.plan import Machine, plan

    options = ("gpu", "gpu_memory", "gpus_per_node", "mfu", "price")
    for line in plan(
        load_config(arguments.overrides),
        Machine(**{name: getattr(arguments, name) for name in options}),
    ):
        print(line)
    return 0


def _launch(arguments) -> int:
    from retemper.launch.slurm import sbatch_script
    from retemper.launch.torchrun import node_commands
    from retemper.pipeline.checkpoint.trunk import check_against_trunk, not_here
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.estimate.nodes import layout_of

    targets = [
        text.removeprefix("target=") for text in arguments.overrides if text.startswith("target=")
    ]
    if targets not in (["torchrun"], ["slurm"]):
        raise UserError("exactly one target is required: target=torchrun or target=slurm")
    overrides = [text for text in arguments.overrides if not text.startswith("target=")]
    config = load_config(overrides)
    check_against_trunk(config)
    layout = layout_of(config, arguments.gpus_per_node)
    for line in not_here(config):
        print(line, file=sys.stderr)  # standard output is the script
    if targets == ["slurm"]:
        print(sbatch_script(overrides, layout, arguments.port), end="")
        return 0
    for node, command in enumerate(
        node_commands(overrides, layout, arguments.host, arguments.port)
    ):
        print(f"# node {node}\n{command}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts positionals in one run only: key=value after an option comes back as unknown.
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(arguments, "overrides")):
        hint = (
            "; config keys have no dashes: write optimizer.lr=3"
            if hasattr(arguments, "overrides")
            else ""
        )
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        arguments.overrides += rest
    return arguments


def _positive(kind: type[int] | type[float]):
    """Return an argparse type that accepts numbers above zero."""

    def positive(text: str) -> float:
        if (number := kind(text)) <= 0:
            raise ValueError
        return number

    return positive


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retemper",
        description=(
            "Continue the pretraining of a language model, by LoRA or in full, "
            "and measure what it learned and forgot."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name, function, summary, *examples, actions=(), positionals=(), overrides=_OVERRIDES):
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(verb=function)
        if actions:
            verb.add_argument("action", choices=actions)
        for positional in positionals:
            verb.add_argument(positional)
        if overrides:
            verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
        return verb

    add(
        "demo",
        _demo,
        "Run the whole pipeline on this machine: documents, shards, base model, full and LoRA "
        "training, report. Resumes where it stopped.",
        "retemper demo",
        "retemper demo parallel=pp2 study=demo-pp2",
    )
    add(
        "tokenize",
        _tokenize,
        "Turn documents into token shards: cleaned, deduplicated, packed. "
        "After a stop, the same command resumes.",
        "retemper tokenize data=local data.source.path=docs/ data.tokenizer=llama/ "
        "data.path=shards/docs data.seq_length=4096",
        "retemper tokenize data=openwebmath data.path=s3://bucket/openwebmath data.tokens=8B",
        "retemper tokenize data=starcoder_python data.path=/shared/starcoder data.executor=slurm "
        "data.slurm.partition=cpu",
    )
    add(
        "train",
        _train,
        "Train one run on this machine. On a cluster, torchrun -m retemper.pipeline.train "
        "accepts the same keys.",
        "retemper train run=demo_full",
        "retemper train run=demo_lora parallel=dp2 method.lora.rank=4 name=lora-r4",
    )
    imported = add(
        "import",
        _import,
        "Convert a transformers folder to a checkpoint that runs can name in init_from. "
        "Its logits are compared with those of transformers.",
        "retemper import Llama-2-7b-hf/ runs/models/llama2-7b",
        "retemper train init_from=runs/models/llama2-7b method=lora …",
        "retemper import Llama-3.1-70B/ runs/models/llama3-70b parallel.tensor_parallel_size=8",
        positionals=("folder", "run"),
    )
    imported.add_argument(
        "--trust",
        metavar="NAME",
        help="name of the folder, to accept one that contains Python code; the code is not run",
    )
    export = add(
        "export",
        _export,
        "Write a checkpoint in the format of transformers, or its adapters in the format of peft. "
        "The written files are compared with the checkpoint before the export counts as complete.",
        "retemper export runs/demo/full exported/",
        "retemper export runs/paper/lora adapter/ --adapter --step 500",
        positionals=("run", "folder"),
        overrides="",
    )
    export.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    export.add_argument(
        "--adapter",
        action="store_true",
        help="export only the adapters, for peft (default: merged into the model)",
    )
    export.add_argument(
        "--base",
        metavar="NAME",
        help="with --adapter: base model that the adapter refers to, a hub name or a transformers "
        "folder (default: the one that was imported)",
    )
    export.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="tokenizer for a model that was never imported (default: the run's data.tokenizer)",
    )
    add(
        "eval",
        _eval,
        "Evaluate the initial model and all checkpoints that have no scores yet, "
        "in the run's parallel layout or another.",
        "retemper eval runs/demo/full",
        "retemper eval runs/demo/full evals=quick evals.tasks_dir=tasks/",
        "retemper eval runs/demo/full parallel=dp2",
        positionals=("run",),
        overrides="overrides of the run's config: evals, parallel, and the current locations of "
        "its files (data.path, init_from)",
    )
    evals = add(
        "evals",
        _evals,
        "worker: evaluate a run's checkpoints as they appear, on the tasks with where=worker, "
        "alongside other workers and the training, until the run is complete. "
        "show: print the scores so far, with the difference from the step-0 model.",
        "retemper evals worker runs/paper/lora evals=paper evals.tasks_dir=tasks/",
        "retemper evals worker runs/paper/lora --only score",
        "retemper evals show runs/paper/lora",
        actions=("worker", "show"),
        positionals=("run",),
        overrides="overrides of the run's config: evals=… and evals.…=…",
    )
    evals.add_argument(
        "--once", action="store_true", help="evaluate existing checkpoints, then exit"
    )
    evals.add_argument(
        "--only",
        choices=("generate", "score"),
        help="do one part of the work, so that generated programs can run on another machine",
    )
    evals.add_argument(
        "--poll",
        type=_positive(float),
        default=30,
        metavar="SECONDS",
        help="interval between checks for new checkpoints (default: 30)",
    )
    evals.add_argument(
        "--lease",
        type=_positive(float),
        default=120,
        metavar="SECONDS",
        help="time after which the job of a dead worker is taken over (default: 120)",
    )
    add(
        "data",
        _data,
        "show: print the text of a step's samples, with its sources and the loss mask. "
        "verify: prove from the ledger (data.ledger=true) that no sample was skipped or repeated.",
        "retemper data show run=demo_full step=12 samples=2",
        "retemper data verify run=demo_full",
        actions=("show", "verify"),
    )
    report = add(
        "report",
        _report,
        "Write report.html and PNG figures from the runs of a study.",
        "retemper report runs/demo",
        overrides="",
    )
    report.add_argument("study", help="folder of the study, i.e. runs_dir/study")
    add(
        "config",
        _config,
        "Print the resolved config of a run.",
        "retemper config run=demo_full",
        "retemper config run=demo_lora parallel=pp2",
    )
    planned = add(
        "plan",
        _plan,
        "Estimate memory, nodes, time, cost, checkpoints and data of a run. Does not start "
        "anything. A layout that cannot fit is refused, and the nearest one that fits is named.",
        "retemper plan run=demo_full",
        "retemper plan study=mine name=lora model=llama2_7b method=lora "
        "init_from=runs/models/llama2 data=starcoder_python data.path=shards/starcoder "
        "train.tokens=20B train.global_batch_size=192 train.micro_batch_size=2 optimizer.lr=2e-4 "
        "parallel.data_parallel_size=8 --price 2.50",
    )
    planned.add_argument(
        "--gpu",
        default="H100",
        help="GPU model whose peak FLOP/s is assumed, e.g. H200 (default: H100)",
    )
    planned.add_argument(
        "--gpu-memory",
        type=_positive(float),
        default=80,
        metavar="GIB",
        help="memory per GPU in GiB (default: 80)",
    )
    planned.add_argument(
        "--gpus-per-node",
        type=_positive(int),
        metavar="N",
        default=8,
        help="GPUs per node (default: 8)",
    )
    planned.add_argument(
        "--mfu",
        type=_positive(float),
        help="expected model FLOPs utilization, as a fraction of the GPU's peak "
        "(default: a measured value)",
    )
    planned.add_argument(
        "--price", type=_positive(float), help="price per GPU-hour; prints a total"
    )
    launch = add(
        "launch",
        _launch,
        "Print the commands that start a run on a cluster.",
        "retemper launch run=demo_full target=torchrun --gpus-per-node 1 --host node0",
        "retemper launch run=demo_full target=slurm > run.sbatch",
    )
    launch.add_argument(
        "--gpus-per-node",
        type=_positive(int),
        metavar="N",
        default=8,
        help="GPUs per node (default: 8)",
    )
    launch.add_argument(
        "--host", default="HEAD_NODE", help="address of the first node, for target=torchrun"
    )
    launch.add_argument(
        "--port",
        type=int,
        default=29500,
        help="rendezvous port on the first node (default: 29500)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
