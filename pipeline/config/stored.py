"""The config that a run's folder holds, as it was written."""

import json
import re
from pathlib import Path
from typing import Any

from retemper.pipeline.errors import UserError

_STEP = re.compile(r"@(\d+)$")


def base_folder(name: str) -> Path:
    """The run folder that init_from names, as RUN or as RUN@STEP."""
    return Path(_STEP.sub("", name))


def base_step(name: str) -> int | None:
    """The step that init_from asks for, as RUN@STEP. None where it names the run alone."""
    asked = _STEP.search(name)
    return int(asked[1]) if asked else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """What config.json of a run's folder holds, if there is one. Raises UserError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged: it holds no JSON object. Restore it "
            "(meta.json of each checkpoint beside it has it under config)"
        )
    return config
