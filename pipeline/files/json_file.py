"""Our JSON files: read, and checked against a type; an error names the file and what to do."""

import functools
import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from retemper.pipeline.errors import UserError

# Decorates a TypedDict of the keys that are used: other keys are kept as they are.
with_other_keys = with_config(ConfigDict(extra="allow"))


def read_json(path: Path, kind: Any, advice: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        kind: The type that it must have, which pydantic checks.
        advice: What to do where it is damaged.

    Raises:
        UserError: It is damaged; the message names the file.
        OSError: It cannot be read.
    """
    try:
        return parse_json(path.read_bytes(), kind)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None


def parse_json(content: bytes, kind: Any) -> Any:
    """Return what JSON text contains.

    Args:
        content: The text, in UTF-8.
        kind: The type that it must have.

    Raises:
        ValueError: It is something else; the message is the reason in a few words.
    """
    if not content.strip():
        raise ValueError("it is empty")
    try:
        return _adapter(kind).validate_python(json.loads(content.decode()))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{place}: {problem['msg']}" if place else problem["msg"]) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)
