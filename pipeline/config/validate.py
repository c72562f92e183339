"""Validation of a plain dictionary against schema and rules, with every problem in one message."""

import copy
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from retemper.pipeline.config.rules import (
    beginning_conflicts,
    conflicts,
    data_conflicts,
    setup_conflicts,
)
from retemper.pipeline.config.stored import RENAMED_KEYS
from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import fields_of


def check_setup(setup: ModelSetup) -> ModelSetup:
    """Check a model against its parallel layout.

    Raises:
        UserError: with every problem in one message.
    """
    if problems := list(setup_conflicts(setup)):
        raise config_error(problems)
    return setup


def check_data(raw: dict[str, Any]) -> DataConfig:
    """Check a data section against the schema and the rules between its keys.

    Raises:
        UserError: with every problem in one message.
    """
    try:
        data = DataConfig.model_validate(raw)
    except ValidationError as error:
        raise config_error(
            [describe_problem(problem, "data.") for problem in error.errors()]
        ) from None
    if problems := list(data_conflicts(data)):
        raise config_error(problems)
    return data


def check_config(raw: dict[str, Any], *, begins: bool = False) -> Config:
    """Check a plain dictionary against the schema and the rules between its keys.

    Args:
        raw: the composed or stored config.
        begins: whether the run is new; an existing run may break rules that were added later.

    Raises:
        UserError: with every problem in one message.
    """
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise config_error(
            [
                *(describe_problem(problem) for problem in error.errors()),
                *_conflicts_beside(error, raw),
            ]
        ) from None
    if problems := [*conflicts(config), *(beginning_conflicts(config) if begins else ())]:
        raise config_error(problems)
    return config


def _conflicts_beside(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """Return the rules broken beside unknown keys.

    With a missing or ill-typed value the rules cannot be checked, and the result is empty.
    """
    known = copy.deepcopy(raw)
    for problem in error.errors():
        if problem["type"] != "extra_forbidden":
            return []
        *path, key = problem["loc"]
        section: Any = known
        for part in path:
            section = section[part]
        del section[key]
    return list(conflicts(Config.model_validate(known)))


def config_error(problems: list[str]) -> UserError:
    """Return one error that lists all problems of a config."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError(
        "\n".join([f"The configuration has {count}:", *(f"  - {problem}" for problem in problems)])
    )


def describe_problem(problem: ErrorDetails, prefix: str = "") -> str:
    """Return the message for one problem that pydantic found, with its key below `prefix`."""
    key = prefix + ".".join(str(part) for part in problem["loc"])
    if new_name := RENAMED_KEYS.get(key):
        return f"{key} is now {new_name}"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key, [name for name, _ in fields_of(Config)])}"
    if problem["type"] == "missing":
        return f"{key} is required: set {key}=…"
    return f"{key}: {problem['msg']} (got {problem['input']!r})"
