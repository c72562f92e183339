"""The one exception whose message is meant for the person at the terminal, and the hint that many of them end with."""

import difflib


class UserError(ValueError):
    """Bad input: the message names the file, key or rank, says what is wrong and what to do. No traceback is shown."""


def nearest(text: str, choices: list[str]) -> str:
    """A question that names the choice most like what was written, or nothing."""
    same_leaf = [choice for choice in choices if choice.split(".")[-1] == text.split(".")[-1]]
    matches = same_leaf[:1] or difflib.get_close_matches(text, choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
