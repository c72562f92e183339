"""Milestones as runs of their own: each goes on from its trunk's checkpoint where its cooldown begins, and cools down to zero.

"LoRA Learns Less and Forgets Less" (arXiv 2405.09673) has its milestones so. Within the warm-up there is no cooldown: warm-up takes
precedence, as in the paper's code.
"""

from typing import Any

from retemper.pipeline import eval_folder, run_folder
from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.distributed.topology import Topology, asked_to_stop, from_rank_zero
from retemper.pipeline.evals.hook import unscored
from retemper.pipeline.schema.base import format_tokens
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.loop import train


def train_with_branches(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> None:
    """Train a run, and then what branches off it and is not complete yet. Every rank calls it."""
    branches = branches_of(config)
    for branch in branches:
        run_folder.check(branch)
    train(config, topology, fingerprints)
    for branch in branches:
        if asked_to_stop():
            return
        if not from_rank_zero(is_complete(branch)):
            train(branch, topology, fingerprints)


def branches_of(trunk: Config) -> list[Config]:
    """The runs that branch off a trunk, by length; each can be trained on its own, too."""
    return [_branch(trunk, tokens) for tokens in sorted(trunk.train.branches)]


def is_complete(config: Config) -> bool:
    """Whether the last checkpoint of a run stands and is scored."""
    scored = not config.evals.heldout or config.steps in eval_folder.read_scores(config.run_dir)
    return config.steps in committed_steps(config.run_dir) and scored and not unscored(config, config.steps)


def _branch(trunk: Config, tokens: int) -> Config:
    changed = {"name": f"{trunk.name}-{format_tokens(tokens)}", "branch_of": str(trunk.run_dir)}
    changed["train"] = trunk.train.model_copy(update={"tokens": tokens, "branches": []})
    changed["checkpoint"] = trunk.checkpoint.model_copy(update={"milestones": []})
    return trunk.model_copy(update=changed)
