"""The base class and the common types of all sections of the schema."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: Any) -> int:
    """Parse a token count: an integer, or a number with K, M, B or T (powers of 1000).

    Args:
        value: an int, float or string, e.g. "0.25B".

    Returns:
        The number of tokens, rounded to an integer.

    Raises:
        ValueError: for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a token count is an integer, or a number with K, M, B or T, as 0.25B")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)\s*([KMBT]?)\s*", str(value))
    if not match:
        raise ValueError(
            f"{value!r} is not a token count: "
            "write an integer, or a number with K, M, B or T, as 0.25B"
        )
    return round(float(match[1]) * _UNITS[match[2]])


def format_tokens(tokens: int) -> str:
    """Format a token count as short as possible without loss, as 250M, 1B or 81920."""
    unit = max(
        (unit for unit, size in _UNITS.items() if tokens % size == 0), key=_UNITS.__getitem__
    )
    return f"{tokens // _UNITS[unit]}{unit}"


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # becomes part of paths
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of the config: strictly typed, immutable, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the key and the field of each value of a section and of the sections within it.

    Where names are free, as those of tasks, NAME stands for one.
    """
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        kinds += tuple(inner for kind in kinds for inner in get_args(kind))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        by_name = any(get_origin(kind) is dict for kind in kinds)
        if sections:
            yield from fields_of(sections[0], f"{prefix}{name}.{'NAME.' if by_name else ''}")
        else:
            yield f"{prefix}{name}", field


def defaults_of(section: type[Section]) -> dict[str, Any]:
    """Return the defaults of a section and of the sections within it, without required keys."""
    defaults = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            defaults[name] = defaults_of(field.annotation)
        elif not field.is_required():
            defaults[name] = field.get_default(call_default_factory=True)
    return defaults
