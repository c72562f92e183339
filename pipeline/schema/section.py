"""The base class and the common types of all sections of the schema."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    unit = max((unit for unit, size in _UNITS.items() if tokens % size == 0), key=_UNITS.get)
    return f"{tokens // _UNITS[unit]}{unit}"


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # becomes part of paths
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of the config: strictly typed, immutable, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )
