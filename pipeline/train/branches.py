"""Milestones as runs of their own: each goes on from its trunk's checkpoint where its cooldown begins, and cools down to zero.

"LoRA Learns Less and Forgets Less" (arXiv 2405.09673) has its milestones so. Within the warm-up there is no cooldown: warm-up takes
precedence, as in the paper's code.
"""

from typing import Any

from retemper.pipeline.checkpoint.base import base_of
from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.checkpoint.trunk import branches_of, differences_of_training
from retemper.pipeline.config.schedules import ending
from retemper.pipeline.data.domains import measures
from retemper.pipeline.distributed.collectives import from_rank_zero
from retemper.pipeline.distributed.signals import asked_to_stop
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.hook import unscored
from retemper.pipeline.model.adapter import scale_of
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.loop import train


def train_with_branches(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> None:
    """Train a run, and then what branches off it and is not complete yet. Every rank calls it."""
    branches = branches_of(config)
    for branch in branches:
        run_folder.check(branch)
    _introduce(config, topology, fingerprints)
    train(config, topology, fingerprints)
    for branch in branches:
        if asked_to_stop():
            return
        if not from_rank_zero(is_complete(branch)):
            _introduce(branch, topology, fingerprints)
            train(branch, topology, fingerprints)


def is_complete(config: Config) -> bool:
    """Whether the last checkpoint of a run stands and is scored."""
    scored = not config.evals.heldout or config.steps in eval_folder.read_scores(config.run_dir)
    return (
        config.steps in committed_steps(config.run_dir)
        and scored
        and not unscored(config, config.steps)
    )


def introduction(config: Config) -> list[str]:
    """The lines that a run prints before it trains: its scale of LoRA, its end, its measures."""
    lines = []
    if lora := config.method.lora:
        scale = f"{scale_of(lora):.6g}"
        lines.append(f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}: updates are scaled by {scale}")
    if config.branch_of:
        lines.append(f"branch of {config.branch_of}: {ending(config)}")
        lines += [f"other than its trunk's: {change}" for change in differences_of_training(config)]
    if config.init_from:
        lines += measures(config)
    return lines


def _introduce(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> None:
    if topology.rank == 0:
        base = base_of(config, fingerprints.get("base"))
        begins = [f"begins from {base}"] if base else []
        for line in [*begins, *introduction(config)]:
            print(f"{config.study}/{config.name}: {line}", flush=True)
