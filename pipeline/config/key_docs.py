"""The meaning, type and default of config keys, as the schema has them."""

import json
import textwrap
from importlib import resources
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import fields_of

_WIDTH = 92
_HEAD = """# Configuration

Every config key with its type, default and meaning, as the schema
([pipeline/schema/](../pipeline/schema/)) has them. `make docs` writes this page, and a test fails
when it is out of date. `retemper config --docs KEY` prints the same for one key, and
`retemper config KEY=VALUE ...` prints a composed configuration.

A key is set on the command line as `key=value`, a preset as `group=name`. A token count may be
written with K, M, B or T, as `20B`. `NAME` stands for a name that is free.
"""


def describe_keys(key: str) -> list[str]:
    """Return lines on a key, on all keys of a section, or for an empty string on all keys.

    Raises:
        UserError: There is no such key; the message names the nearest.
    """
    fields = dict(fields_of(Config))
    chosen = [name for name in fields if not key or name == key or name.startswith(f"{key}.")]
    if not chosen:
        sections = {name.rpartition(".")[0] for name in fields} - {""}
        raise UserError(f"{key}: unknown key{nearest(key, [*fields, *sorted(sections)])}")
    lines = []
    for name in chosen:
        field = fields[name]
        lines.append(f"{name}: {_type_name(field.annotation)}, {_default(field)}")
        lines += textwrap.wrap(
            field.description or "", _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return lines


def key_of_option(option: str) -> str | None:
    """Return the config key that is meant by an option, as optimizer.lr by --lr."""
    name = option.lstrip("-").replace("-", "_")
    keys = [key for key, _ in fields_of(Config)]
    same = [key for key in keys if key == name or key.endswith(f".{name}")]
    return min(same, key=len) if same else None


def _type_name(annotation: Any) -> str:
    """Return the type of a key in words, as `on | off` or `list of int`."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"{_type_name(arguments[1])} by name"
    if get_origin(annotation) is not None or arguments:
        names = [_type_name(argument) for argument in arguments if _is_type(argument)]
        return " | ".join(dict.fromkeys(names))
    return getattr(annotation, "__name__", str(annotation))


def _is_type(argument: Any) -> bool:
    return isinstance(argument, type) or get_origin(argument) is not None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"default {json.dumps(default, default=str)}"


def keys_as_markdown() -> str:
    """Return docs/configuration.md: the presets of each group, and a table of each section."""
    lines = [_HEAD, "## Presets", "", "| group | presets |", "|---|---|"]
    lines += [f"| `{group}=` | {', '.join(names)} |" for group, names in _presets().items()]
    section = None
    for key, field in fields_of(Config):
        of_key = key.partition(".")[0] if "." in key else ""
        if of_key != section:
            section = of_key
            title = f"`{section}`" if section else "Keys without a section"
            lines += [
                "",
                f"## {title}",
                "",
                "| key | type and default | meaning |",
                "|---|---|---|",
            ]
        kind = f"{_type_name(field.annotation)}, {_default(field)}".replace("|", "\\|")
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | {meaning} |")
    return "\n".join(lines) + "\n"


def _presets() -> dict[str, list[str]]:
    groups = sorted(
        entry.name
        for entry in resources.files("retemper.conf").iterdir()
        if entry.is_dir() and not entry.name.startswith("_")
    )
    return {
        group: sorted(
            entry.name.removesuffix(".yaml")
            for entry in (resources.files("retemper.conf") / group).iterdir()
        )
        for group in groups
    }


if __name__ == "__main__":
    print(keys_as_markdown(), end="")
