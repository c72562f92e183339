"""A trunk and the runs that branch off it: what they share and what may differ. Without torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.config.stored import base_folder, base_step, read_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import format_tokens

# The keys in which a branch may differ from its trunk, besides those that a restart may change.
_MAY_DIFFER = (
    *run_folder.MAY_CHANGE,
    "study:",
    "name:",
    "optimizer.lr:",
    "optimizer.weight_decay:",
    "schedule.",
    "train.tokens:",
    "train.cuda_graph:",
)
# Those of them that determine how the branch trains, not where it runs.
_OF_TRAINING = ("optimizer.", "schedule.", "train.micro_batch_size:", "parallel.")


def branches_of(trunk: Config) -> list[Config]:
    """Return the runs that branch off a trunk, by length; each can also be trained separately."""
    return [_branch(trunk, tokens) for tokens in sorted(trunk.train.branches)]


def _branch(trunk: Config, tokens: int) -> Config:
    changed: dict[str, Any] = {"name": f"{trunk.name}-{format_tokens(tokens)}"}
    changed["branch_of"] = str(trunk.run_dir)
    changed["train"] = trunk.train.model_copy(
        update={"tokens": tokens, "epochs": None, "branches": []}
    )
    changed["checkpoint"] = trunk.checkpoint.model_copy(update={"milestones": []})
    return trunk.model_copy(update=changed)


def check_trunk(config: Config) -> None:
    """Check that a branch can start from its trunk.

    A branch that already has a checkpoint continues from that and needs no trunk.

    Raises:
        UserError: the trunk is missing, is another run, or has no checkpoint where the cooldown
            begins.
    """
    if config.branch_of is None or commit.committed_steps(config.run_dir):
        return
    trunk = Path(config.branch_of)
    if read_config(trunk) is None:
        raise UserError(
            f"branch_of={trunk}: there is no run (no config.json); train that run first, "
            "or correct the path"
        )
    check_against_trunk(config)
    begins = config.cooldown_begins(config.train.tokens)
    available = commit.committed_steps(trunk)
    if begins not in available:
        which = "another trunk, under another name," if _is_past(begins, available) else "the trunk"
        raise UserError(
            f"branch_of={trunk}: the cooldown of train.tokens={config.train.tokens} begins after "
            f"step {begins}, of which the trunk has no checkpoint (it has: {_listed(available)}). "
            f"Train {which} with train.branches=[{config.train.tokens}], or set train.tokens "
            "so that the cooldown begins after one of those steps"
        )


def check_branches(trunk: Config) -> None:
    """Check that a trunk has, or will have, the checkpoints from which its branches start.

    Raises:
        UserError: the trunk is past the start of a branch and has no checkpoint there.
    """
    available = commit.committed_steps(trunk.run_dir)
    for branch in branches_of(trunk):
        begins = trunk.cooldown_begins(branch.train.tokens)
        started = commit.committed_steps(branch.run_dir)
        if _is_past(begins, available) and not started and begins not in available:
            raise UserError(
                f"train.branches: the cooldown of the branch of {branch.train.tokens} tokens "
                f"begins after step {begins}, which {trunk.run_dir} has passed without a "
                f"checkpoint (it has: {_listed(available)}). Remove that branch, or train another "
                "trunk with it, under another name"
            )


def _is_past(step: int, available: list[int]) -> bool:
    """Return whether a run with these checkpoints will not save one after `step` any more."""
    return step < max(available, default=0)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def check_against_trunk(config: Config) -> None:
    """Check that a branch continues the training of its trunk.

    Raises:
        UserError: keys differ in which a branch must equal its trunk; the message names each.
    """
    refused = [change for change in differences(config) if not change.startswith(_MAY_DIFFER)]
    if config.data.allow_change:
        refused = [change for change in refused if not run_folder.is_of_data(change)]
    if refused:
        listed = "\n".join(f"  - {change}" for change in refused)
        raise UserError(
            f"branch_of={config.branch_of}: a branch goes on with its trunk's weights, optimizer "
            f"and data, but these differ:\n{listed}\nSet them to the trunk's values, which are "
            "listed first, or leave out branch_of for an independent run"
        )


def differences(config: Config) -> list[str]:
    """Return the keys in which a branch differs from its trunk.

    Each has the form "key: value of the trunk -> value of the branch".
    The list is empty where the trunk's folder is missing.

    Raises:
        UserError: branch_of is not the folder of a run.
    """
    raw = read_config(Path(config.branch_of)) if config.branch_of else None
    if raw is None:
        return []
    try:
        # Keys that came later than the trunk have their defaults.
        trunk = Config.model_validate(raw)
    except ValidationError:
        raise UserError(
            f"branch_of={config.branch_of}: its config.json is not that of a training run; "
            "an imported model is named in init_from"
        ) from None
    return changed_keys(json.loads(trunk.to_json()), json.loads(config.to_json()))


def differences_of_training(config: Config) -> list[str]:
    """Return those differences from its trunk that determine how a branch trains."""
    return [change for change in differences(config) if change.startswith(_OF_TRAINING)]


def not_here(config: Config) -> list[str]:
    """Return notes on a missing base or trunk for a plan or launch, which need only the config."""
    lines = []
    for name, key in (("trunk", "branch_of"), ("base", "init_from")):
        folder = getattr(config, key)
        if folder and read_config(base_folder(folder)) is None:
            lines.append(f"{name} not here: shape from model=; `train` needs {key}={folder}")
    if config.init_from and not lines:
        lines += _step_not_here(config.init_from)
    return lines


def _step_not_here(init_from: str) -> list[str]:
    step = base_step(init_from)
    available = commit.committed_steps(base_folder(init_from))
    if step is None or step in available:
        return []
    listed = _listed(available)
    return [f"base's checkpoint not here: `train` needs init_from={init_from} (it has: {listed})"]
