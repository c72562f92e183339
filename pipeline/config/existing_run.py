"""The config of an existing run, with the overrides that an evaluation may set."""

import copy
import os
import re
from pathlib import Path
from typing import Any

from retemper.pipeline.config.compose import compose
from retemper.pipeline.config.stored import RESTORE, read_config
from retemper.pipeline.config.validate import check_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config

# The sections that may be overridden when an existing run is evaluated.
EVAL_OVERRIDES = ("evals",)

# The same for a worker, which reads the tokenizer and compares it with that of the corpus.
WORKER_OVERRIDES = (*EVAL_OVERRIDES, "data.path", "data.tokenizer")

# The same where the ranks of a launch evaluate it, which need its inputs and a parallel layout.
SCORING_OVERRIDES = (
    *WORKER_OVERRIDES,
    "parallel",
    "train.micro_batch_size",
    "track",
    "init_from",
)

# What may have moved since, where the samples of an existing run are shown.
DATA_LOCATIONS = ("data.path", "data.tokenizer", "data.replay.path")

# Keys of evals that a preset leaves as they are: what the run has been scored on, and what fits
# its machine.
_PRESERVED_BY_PRESET = ("heldout", "learned", "max_samples", "micro_batch_size", "tasks_dir")


def load_run(
    run_dir: Path, overrides: list[str], may_change: tuple[str, ...] = EVAL_OVERRIDES
) -> Config:
    """Load the config of a run from its folder, wherever that is located now.

    Args:
        run_dir: the run's folder; runs_dir, study and name are set to it.
        overrides: `key=value`, and presets of sections.
        may_change: the sections and keys that may be overridden.

    Raises:
        UserError: for other overrides, or where the folder is not that of a trained run.
    """
    if unknown := [
        text for text in overrides if not any(_targets_key(text, key) for key in may_change)
    ]:
        raise UserError(
            f"{unknown[0]}: cannot be overridden for an existing run; "
            f"allowed: {', '.join(may_change)}"
        )
    folder = Path(os.path.abspath(run_dir))
    raw = read_config(folder)
    if raw is None:
        raise UserError(
            f"{run_dir} is no run folder: it has no config.json; "
            "pass runs_dir/study/name of a run that has begun"
        )
    if "evals" not in raw:
        raise UserError(
            f"{run_dir} is an imported model, which no run has trained: "
            "pass the folder of a run that starts from it"
        )
    raw |= {"runs_dir": str(folder.parent.parent), "study": folder.parent.name, "name": folder.name}
    try:
        stored = check_config(raw)
    except UserError as error:
        raise UserError(
            f"{folder / 'config.json'} is damaged, or of another version of retemper: {RESTORE}. "
            f"{error}"
        ) from None
    return check_config(_with_overrides(stored.model_dump(), overrides)) if overrides else stored


def _targets_key(text: str, key: str) -> bool:
    """Return whether an override sets a key, or one below it."""
    return re.match(rf"{re.escape(key)}[.=]", text) is not None


def _with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a run's config in which presets and single values replace those of the run."""
    composed = compose(overrides)
    changed = copy.deepcopy(raw)
    for section in ("evals", "parallel"):
        if presets := [text for text in overrides if text.startswith(f"{section}=")]:
            preserved = (
                {key: raw[section][key] for key in _PRESERVED_BY_PRESET}
                if section == "evals"
                else {}
            )
            changed[section] = compose(presets)[section] | preserved
    for *sections, key in (text.partition("=")[0].split(".") for text in overrides):
        if sections or key not in ("evals", "parallel"):
            value = composed
            target = changed
            for section in sections:
                value = value[section]
                target = target.setdefault(section, {})
            target[key] = value[key]
    return changed
