"""Milestones as separate runs, called branches.

Each branch starts from its trunk's checkpoint at the step where its cooldown begins, and cools down
to zero. "LoRA Learns Less and Forgets Less" (arXiv 2405.09673) computes its milestones in this way.
There is no cooldown within the warm-up: warm-up takes precedence, as in the paper's code.
"""

from typing import Any

from retemper.pipeline.checkpoint.base import base_of
from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.checkpoint.trunk import branches_of, differences_of_training
from retemper.pipeline.config.schedules import ending
from retemper.pipeline.data.domains import measures
from retemper.pipeline.distributed.collectives import broadcast_from_rank0
from retemper.pipeline.distributed.signals import stop_requested
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.hook import unscored
from retemper.pipeline.model.adapter import lora_scaling
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.loop import train


def train_with_branches(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> None:
    """Train a run, and then those of its branches that are not complete yet.

    Args:
        config: of the trunk.
        topology: of this rank.
        fingerprints: of the data, the tokenizer and the base.

    Raises:
        UserError: the folder of a branch belongs to another config.

    Collective: every rank must call this.
    """
    branches = branches_of(config)
    for branch in branches:
        run_folder.check_resumable(branch)
    _introduce(config, topology, fingerprints)
    train(config, topology, fingerprints)
    for branch in branches:
        if stop_requested():
            return
        if not broadcast_from_rank0(is_complete(branch)):
            _introduce(branch, topology, fingerprints)
            train(branch, topology, fingerprints)


def is_complete(config: Config) -> bool:
    """Return whether the last checkpoint of a run is committed and scored."""
    scored = not config.evals.heldout or config.steps in eval_folder.read_scores(config.run_dir)
    return (
        config.steps in committed_steps(config.run_dir)
        and scored
        and not unscored(config, config.steps)
    )


def introduction(config: Config) -> list[str]:
    """Return the lines that a run prints before it trains.

    They name the LoRA scaling factor; for a branch, how it ends and how it differs from its trunk;
    and for a run that starts from a base, what learning and forgetting are measured on.
    """
    lines = []
    if lora := config.method.lora:
        scale = f"{lora_scaling(lora):.6g}"
        lines.append(f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}: updates are scaled by {scale}")
        if lora.kernel == "fused" and config.unfused_because:
            causes = " and ".join(config.unfused_because)
            lines.append(f"LoRA: computed with method.lora.kernel=plain, slower, due to {causes}")
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
