"""The command `retemper`. Heavy imports happen inside the verb that needs them, so that --help answers at once."""

import argparse
import sys
from pathlib import Path

from retemper.pipeline.errors import UserError

_OVERRIDES = "any config key as key=value, and presets as group=name: run, model, data, method, parallel, optimizer, schedule, evals"


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 1 for bad input or a failed run, 130 after Ctrl-C."""
    arguments = _parse(argv)
    try:
        return arguments.verb(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}; what was finished is kept",
            file=sys.stderr,
        )
        return 1


def _tokenize(arguments) -> int:
    from retemper.pipeline.config.compose import load_data_config
    from retemper.tokenize.job import tokenize

    data = load_data_config(arguments.overrides)
    manifest = tokenize(data)
    if manifest is None:
        print(
            "submitted; `squeue --me` shows the jobs. The same command says what came of them, and goes on where they stopped"
        )
        return 0
    for split, counts in manifest["splits"].items():
        print(
            f"{data.path}/{split}: {counts['samples']:,} samples, {counts['tokens']:,} tokens from {counts['documents']:,} documents "
            f"({counts['padding_fraction']:.2%} padding, {counts['cut_documents_fraction']:.1%} of the documents cut)"
        )
    dropped = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest["dropped"].items()
    )
    print(f"{manifest['documents_read']:,} documents read; left out: {dropped or 'none'}")
    if line := _near_duplicates(manifest):
        print(line)
    reason = manifest["encoder"].get("reason")
    print(f"encoded by {manifest['encoder']['name']}{f': {reason}' if reason else ''}")
    for file in manifest["broken_files"]:
        print(f"damaged: {file['file']} ({file['error']}; {file['records_read']:,} records read)")
    return 0


def _near_duplicates(manifest: dict) -> str:
    """What became of training documents that are near-duplicates of held-out ones.

    Empty where there is no held-out text.
    """
    if not manifest["splits"]["heldout"]["documents"]:
        return ""
    found = manifest.get("near_duplicates", {"action": "keep"})
    if found["action"] == "keep":
        return (
            "near-duplicates of held-out documents were not looked for: "
            "data.near_duplicates=count with another data.path does"
        )
    of_heldout = f"near-duplicates of the {found['compared_with']:,} held-out documents"
    documents = f"{found['documents']:,}"
    if found["action"] == "drop":
        return f"{of_heldout}: {documents} documents left out of training (near_duplicates.jsonl)"
    return (
        f"{of_heldout}: {documents} of {manifest['splits']['train']['documents']:,} "
        "training documents (near_duplicates.jsonl); data.near_duplicates=drop leaves them out"
    )


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
    # What can be said of config.json is said before any rank starts, which then reads the rest.
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
            "--base goes with --adapter: a whole model brings its base's weights itself"
        )
    options = {
        name: getattr(arguments, name)
        for name in ("run", "folder", "step", "adapter", "base", "tokenizer")
    }
    return run_here("retemper.pipeline.huggingface", ["export", json.dumps(options)], 1)


def _refuse_existing(target: str) -> None:
    if Path(target).exists():
        raise UserError(f"{target} exists already: remove it, or name another folder")


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
            f"{arguments.run} names no task for workers: set evals=paper, or evals.tasks.humaneval.where=worker"
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
            raise UserError(f"{text}: {key} is a whole number")
        else:
            options[key] = int(value)
    if arguments.action == "show" and options["step"] is None:
        raise UserError("name the step to show, counted from 1: step=12")
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
        raise UserError("name one target: target=torchrun or target=slurm")
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
    # argparse takes positionals in one run only: key=value after an option comes back as unknown.
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _positive(kind: type[int] | type[float]):
    """An argparse type: a number above zero."""

    def positive(text: str) -> float:
        if (number := kind(text)) <= 0:
            raise ValueError
        return number

    return positive


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retemper",
        description="Continue the pretraining of a language model, by LoRA or in full, and measure what it learned and forgot.",
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
        "demo", _demo, "The whole line on this machine: documents, shards, base, full and LoRA training, report. Continues where it stopped.",
        "retemper demo", "retemper demo parallel=pp2 study=demo-pp2",
    )  # fmt: skip
    add(
        "tokenize", _tokenize, "Turn documents into token shards: cleaned, deduplicated, packed. The same command goes on after a stop.",
        "retemper tokenize data=local data.source.path=docs/ data.tokenizer=llama/ data.path=shards/docs data.seq_length=4096",
        "retemper tokenize data=openwebmath data.path=s3://bucket/openwebmath data.tokens=8B",
        "retemper tokenize data=starcoder_python data.path=/shared/starcoder data.executor=slurm data.slurm.partition=cpu",
    )  # fmt: skip
    add(
        "train", _train, "Train one run on this machine; on a cluster, torchrun -m retemper.pipeline.train takes the same keys.",
        "retemper train run=demo_full", "retemper train run=demo_lora parallel=dp2 method.lora.rank=4 name=lora-r4",
    )  # fmt: skip
    imported = add(
        "import", _import, "Make a transformers folder the base of runs: a checkpoint to name in init_from, its logits compared with transformers'.",
        "retemper import Llama-2-7b-hf/ runs/models/llama2-7b", "retemper train init_from=runs/models/llama2-7b method=lora …",
        "retemper import Llama-3.1-70B/ runs/models/llama3-70b parallel.tensor_parallel_size=8", positionals=("folder", "run"),
    )  # fmt: skip
    imported.add_argument(
        "--trust",
        metavar="NAME",
        help="the folder's name, to read a folder that brings Python code; it is not run",
    )
    export = add(
        "export", _export, "Write a checkpoint as files that stock transformers load, or an adapter for peft, compared before it is called done.",
        "retemper export runs/demo/full exported/", "retemper export runs/paper/lora adapter/ --adapter --step 500",
        positionals=("run", "folder"), overrides="",
    )  # fmt: skip
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.add_argument(
        "--adapter",
        action="store_true",
        help="the adapters alone, for peft (default: merged into the model)",
    )
    export.add_argument(
        "--base",
        metavar="NAME",
        help="with --adapter: the base that the adapter names, a hub name or a transformers folder (default: what it was imported as)",
    )
    export.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="for a model that was never imported (default: the run's data.tokenizer)",
    )
    add(
        "eval", _eval, "Score what a run began with and every checkpoint, on what they have no scores of yet, in its own layout or another.",
        "retemper eval runs/demo/full", "retemper eval runs/demo/full evals=quick evals.tasks_dir=tasks/", "retemper eval runs/demo/full parallel=dp2",
        positionals=("run",), overrides="in place of the run's own: evals, parallel, and where its files are now (data.path, init_from)",
    )  # fmt: skip
    evals = add(
        "evals", _evals, "worker: score a run's checkpoints as they come on the tasks that are for workers, beside other workers and the "
        "training, until the run is over. show: what was scored so far, with the difference from the step-0 model.",
        "retemper evals worker runs/paper/lora evals=paper evals.tasks_dir=tasks/", "retemper evals worker runs/paper/lora --only score",
        "retemper evals show runs/paper/lora",
        actions=("worker", "show"), positionals=("run",), overrides="in place of the run's own: evals=… and evals.…=…",
    )  # fmt: skip
    evals.add_argument(
        "--once", action="store_true", help="evaluate the checkpoints that are there, and end"
    )
    evals.add_argument(
        "--only",
        choices=("generate", "score"),
        help="one part of the work: generated programs can be run on another machine",
    )
    evals.add_argument(
        "--poll",
        type=_positive(float),
        default=30,
        metavar="SECONDS",
        help="between looks for checkpoints (default: 30)",
    )
    evals.add_argument(
        "--lease",
        type=_positive(float),
        default=120,
        metavar="SECONDS",
        help="after which a dead worker's job is taken over (default: 120)",
    )
    add(
        "data", _data, "show: the text of a step's samples, with its sources and what counts in the loss. verify: prove from the ledger "
        "(data.ledger=true) that no sample was skipped or repeated.",
        "retemper data show run=demo_full step=12 samples=2", "retemper data verify run=demo_full",
        actions=("show", "verify"),
    )  # fmt: skip
    report = add(
        "report",
        _report,
        "Write report.html and PNG figures from the runs of a study.",
        "retemper report runs/demo",
        overrides="",
    )
    report.add_argument("study", help="the folder of a study, that is runs_dir/study")
    add(
        "config",
        _config,
        "Print the resolved config of a run.",
        "retemper config run=demo_full",
        "retemper config run=demo_lora parallel=pp2",
    )
    planned = add(
        "plan", _plan, "Say what a run will take before it is started: memory of a GPU, nodes, time, cost, checkpoints, data. What cannot "
        "fit is refused, with the nearest layout that does.",
        "retemper plan run=demo_full",
        "retemper plan study=mine name=lora model=llama2_7b method=lora init_from=runs/models/llama2 data=starcoder_python "
        "data.path=shards/starcoder train.tokens=20B train.global_batch_size=192 train.micro_batch_size=2 optimizer.lr=2e-4 "
        "parallel.data_parallel_size=8 --price 2.50",
    )  # fmt: skip
    planned.add_argument(
        "--gpu",
        default="H100",
        help="whose peak the time is reckoned by, as CUDA names it (default: H100)",
    )
    planned.add_argument(
        "--gpu-memory",
        type=_positive(float),
        default=80,
        metavar="GIB",
        help="of one GPU (default: 80)",
    )
    planned.add_argument(
        "--gpus-per-node",
        type=_positive(int),
        metavar="N",
        default=8,
        help="ranks a node holds (default: 8)",
    )
    planned.add_argument(
        "--mfu",
        type=_positive(float),
        help="share of the GPU's peak that is expected (default: as measured)",
    )
    planned.add_argument(
        "--price", type=_positive(float), help="of one GPU for an hour, for the cost"
    )
    launch = add(
        "launch", _launch, "Print the commands that start a run on a cluster.",
        "retemper launch run=demo_full target=torchrun --gpus-per-node 1 --host node0", "retemper launch run=demo_full target=slurm > run.sbatch",
    )  # fmt: skip
    launch.add_argument(
        "--gpus-per-node",
        type=_positive(int),
        metavar="N",
        default=8,
        help="ranks a node holds (default: 8)",
    )
    launch.add_argument(
        "--host", default="HEAD_NODE", help="address of the first node, for target=torchrun"
    )
    launch.add_argument(
        "--port",
        type=int,
        default=29500,
        help="port of the rendezvous on the first node (default: 29500)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
