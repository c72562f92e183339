"""The words key=value of a command line, in the form that Hydra's grammar takes as it is meant.

Hydra parses values like YAML: 3.10 is a number, and ~, # or 文 are errors. A value of a key whose
type is text is therefore passed to it in quotes.
"""

import os
import re
from functools import cache
from types import NoneType
from typing import get_args, get_origin

from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import fields_of


def quoted(word: str) -> str:
    """Return key=value with the value in quotes where the key is text; others are as they were.

    A value that is in quotes already keeps those. ~/ is the home folder, which shells replace at
    the beginning of a word only.
    """
    key, _, value = word.partition("=")
    if value in ("", "null") or value[0] in "'\"" or _texts().isdisjoint(_patterns(key)):
        return word
    value = os.path.expanduser(value) if value.startswith("~/") else value
    # A backslash stands for itself, except before a quote.
    escaped = re.sub(r'(\\+)(?="|$)', r"\1\1", value).replace('"', r"\"")
    return f'{key}="{escaped}"'


@cache
def _texts() -> set[str]:
    """Return the keys of text, with * for free names."""
    texts = set()
    for key, field in fields_of(Config):
        kinds = get_args(field.annotation) or (field.annotation,)
        if get_origin(field.annotation) is dict and kinds[1] is str:
            texts.add(f"{key}.*")
        elif str in kinds and {*kinds} <= {str, NoneType}:
            texts.add(key.replace("NAME", "*"))
    return texts


def _patterns(key: str) -> list[str]:
    """Return a key, and the same with * in the place of each of its names."""
    parts = key.split(".")
    starred = [[*parts[:n], "*", *parts[n + 1 :]] for n in range(1, len(parts))]
    return [key, *map(".".join, starred)]
