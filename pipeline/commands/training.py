"""The verbs for runs: demo, train, config, plan and launch."""

import argparse
import sys
from pathlib import Path
from typing import Any

from retemper.pipeline.commands.options import (
    add_gpus_per_node,
    add_verb,
    announce_loading,
    positive,
)

_NO_HOST = "HEAD_NODE"
_PLANNED = (
    "study=mine name=lora model=llama2_7b method=lora init_from=runs/models/llama2 "
    "data=starcoder_python data.path=shards/starcoder train.tokens=20B "
    "train.global_batch_size=192 train.micro_batch_size=2 optimizer.lr=2e-4 "
    "parallel.data_parallel_size=8"
)


def add_to(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    add_verb(
        verbs,
        "demo",
        _demo,
        "Run the whole pipeline on this machine: documents, shards, base model, full and LoRA "
        "training, report. Resumes where it stopped.",
        ["retemper demo", "retemper demo parallel=pp2 study=demo-pp2"],
    )
    add_verb(
        verbs,
        "train",
        _train,
        "Train one run on this machine. On a cluster, torchrun -m retemper.pipeline.train "
        "accepts the same keys.",
        [
            "retemper train run=demo_full",
            "retemper train run=demo_lora parallel=dp2 method.lora.rank=4 name=lora-r4",
        ],
    )
    _add_config(verbs)
    _add_plan(verbs)
    _add_launch(verbs)


def _add_config(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "config",
        _config,
        "Print the resolved config of a run, or the meaning of config keys.",
        [
            "retemper config run=demo_full",
            "retemper config run=demo_lora parallel=pp2",
            "retemper config --docs method.lora",
        ],
    )
    verb.add_argument(
        "--docs",
        nargs="?",
        const="",
        metavar="KEY",
        help="print meaning, type and default of a key, of all keys of a section, or of all keys",
    )


def _add_plan(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "plan",
        _plan,
        "Estimate memory, nodes, time, cost, checkpoints and data of a run. Does not start "
        "anything. A layout that cannot fit is refused, and the nearest one that fits is named.",
        ["retemper plan run=demo_full", f"retemper plan {_PLANNED} --price 2.50"],
    )
    verb.add_argument(
        "--gpu",
        default="H100",
        help="GPU model whose peak FLOP/s is assumed, e.g. H200 (default: H100)",
    )
    verb.add_argument(
        "--gpu-memory",
        type=positive(float),
        default=80,
        metavar="GIB",
        help="memory per GPU in GiB (default: 80)",
    )
    add_gpus_per_node(verb)
    verb.add_argument(
        "--mfu",
        type=positive(float),
        help="expected model FLOPs utilization, as a fraction of the GPU's peak "
        "(default: a measured value)",
    )
    verb.add_argument("--price", type=positive(float), help="price per GPU-hour; prints a total")


def _add_launch(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "launch",
        _launch,
        "Print the commands that start a run on a cluster.",
        [
            "retemper launch run=demo_full --target torchrun --gpus-per-node 1 --host node0",
            "retemper launch run=demo_full --target slurm > run.sbatch",
        ],
    )
    verb.add_argument(
        "--target",
        required=True,
        choices=("torchrun", "slurm"),
        help="torchrun: one command per node; slurm: a script for sbatch",
    )
    add_gpus_per_node(verb)
    verb.add_argument(
        "--host", default=_NO_HOST, help="address of the first node, for --target torchrun"
    )
    verb.add_argument(
        "--port",
        type=int,
        default=29500,
        help="rendezvous port on the first node (default: 29500)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.study.demo import run_demo

    return run_demo(arguments.keys)


def _train(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.compose import load_config

    config = load_config(arguments.keys)
    announce_loading("torch and megatron-core")
    from retemper.launch.local import run_here
    from retemper.pipeline.entry.preflight import preflight

    preflight(config)
    return run_here("retemper.pipeline.train", arguments.keys, config.parallel.world_size)


def _config(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.compose import load_config, to_yaml
    from retemper.pipeline.config.key_docs import describe_keys

    if arguments.docs is None:
        print(to_yaml(load_config(arguments.keys)), end="")
    else:
        print("\n".join(describe_keys(arguments.docs)))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.estimate.plan import Machine, plan

    names = ("gpu", "gpu_memory", "gpus_per_node", "mfu", "price")
    machine = Machine(**{name: getattr(arguments, name) for name in names})
    for line in plan(load_config(arguments.keys), machine):
        print(line, flush=True)
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from retemper.launch.slurm import sbatch_script
    from retemper.launch.torchrun import node_commands
    from retemper.pipeline.checkpoint.trunk import check_against_trunk, not_here
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.estimate.nodes import layout_of

    config = load_config(arguments.keys)
    check_against_trunk(config)
    layout = layout_of(config, arguments.gpus_per_node)
    for line in not_here(config):
        print(line, file=sys.stderr)  # standard output is the script
    if arguments.target == "slurm":
        print(sbatch_script(arguments.keys, layout, arguments.port), end="")
        return 0
    print(f"# Start each command on its node in {Path.cwd()}, with the same Python environment.")
    if arguments.host == _NO_HOST:
        print(f"# Replace {_NO_HOST} by the address of node 0, or give it as --host.")
    commands = node_commands(arguments.keys, layout, arguments.host, arguments.port)
    for node, command in enumerate(commands):
        print(f"# node {node}\n{command}")
    return 0
