"""The config that is stored in a run's folder, as it was written."""

import re
from pathlib import Path
from typing import Any, TypedDict

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import read_json, with_other_keys

# Keys that were renamed: configs of older runs have the old name.
RENAMED_KEYS = {"anomaly.left_out_steps": "anomaly.skip_batches"}
_STEP = re.compile(r"@(\d+)$")
RESTORE = "restore it (meta.json of each checkpoint beside it contains it under config)"


@with_other_keys
class _Adapters(TypedDict):
    alpha: Any


@with_other_keys
class _Method(TypedDict, total=False):
    lora: _Adapters | None


@with_other_keys
class _Parts(TypedDict, total=False):
    """What is read of a stored config before all of it is checked against the schema."""

    model: dict[str, Any]
    method: _Method
    anomaly: dict[str, Any]
    init_from: str | None
    branch_of: str | None


def base_folder(name: str) -> Path:
    """Return the run folder in a value of init_from, RUN or RUN@STEP."""
    return Path(_STEP.sub("", name))


def base_step(name: str) -> int | None:
    """Return the step in a value of init_from, RUN@STEP, or None for RUN alone."""
    step = _STEP.search(name)
    return int(step[1]) if step else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read config.json of a run's folder, or return None where it is missing.

    Raises:
        UserError: where it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, _Parts, RESTORE)
    if not config:
        raise UserError(f"{path} is damaged (it has no keys): {RESTORE}")
    return _with_new_names(config)


def _with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.partition(".")
        if key in config.get(section, {}):
            config[section][new.partition(".")[2]] = config[section].pop(key)
    return config
