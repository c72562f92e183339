"""The config that is stored in a run's folder, as it was written."""

import json
import re
from pathlib import Path
from typing import Any

from retemper.pipeline.errors import UserError

# Keys that were renamed: configs of older runs have the old name.
RENAMED_KEYS = {"anomaly.left_out_steps": "anomaly.skip_batches"}
_STEP = re.compile(r"@(\d+)$")


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
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged: it is not a JSON object. Restore it "
            "(meta.json of each checkpoint beside it contains it under config)"
        )
    return _with_new_names(config)


def _with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.partition(".")
        if key in config.get(section, {}):
            config[section][new.partition(".")[2]] = config[section].pop(key)
    return config
