"""The config of a run that has begun, with the overrides that an evaluation may give."""

import copy
import os
import re
from pathlib import Path
from typing import Any

from retemper.pipeline.config.compose import compose
from retemper.pipeline.config.stored import read_config
from retemper.pipeline.config.validate import check_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config

# What may be said anew of a run that is evaluated, and of one that ranks of a launch evaluate, who need its inputs and a layout.
OF_EVALUATIONS = ("evals",)


OF_SCORING = (
    *OF_EVALUATIONS,
    "parallel",
    "train.micro_batch_size",
    "track",
    "init_from",
    "data.path",
    "data.tokenizer",
)


# Of its evaluations, what a preset leaves as it was: what the run has been scored on so far, and what fits its machine.
_KEPT = ("heldout", "learned", "max_samples", "micro_batch_size", "tasks_dir")


def load_run(
    run_dir: Path, overrides: list[str], may_change: tuple[str, ...] = OF_EVALUATIONS
) -> Config:
    """The config of a run's folder, wherever that stands now, with keys as given here where they are. Raises UserError.

    may_change: the sections and keys that may be given.
    """
    if strange := [text for text in overrides if not any(_is_of(text, key) for key in may_change)]:
        raise UserError(
            f"{strange[0]}: the run's own config holds; what can be given anew is {', '.join(may_change)}"
        )
    folder = Path(os.path.abspath(run_dir))
    raw = read_config(folder)
    if raw is None:
        raise UserError(
            f"{run_dir} is no run folder: it has no config.json; name runs_dir/study/name of a run that has begun"
        )
    if "evals" not in raw:
        raise UserError(
            f"{run_dir} is an imported model, which no run has trained: name the folder of a run that begins from it"
        )
    raw |= {"runs_dir": str(folder.parent.parent), "study": folder.parent.name, "name": folder.name}
    return check_config(_with_overrides(raw, overrides) if overrides else raw)


def _is_of(text: str, key: str) -> bool:
    """Whether an override sets a key, or one below it."""
    return re.match(rf"{re.escape(key)}[.=]", text) is not None


def _with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run's config with presets and single values in place of its own."""
    composed = compose(overrides)
    changed = copy.deepcopy(raw)
    for section in ("evals", "parallel"):
        if presets := [text for text in overrides if text.startswith(f"{section}=")]:
            kept = {key: raw[section][key] for key in _KEPT} if section == "evals" else {}
            changed[section] = compose(presets)[section] | kept
    for *sections, key in (text.partition("=")[0].split(".") for text in overrides):
        if sections or key not in ("evals", "parallel"):
            value = composed
            target = changed
            for section in sections:
                value = value[section]
                target = target.setdefault(section, {})
            target[key] = value[key]
    return changed
