"""The exception that is shown to the user, and the suggestion that many of its messages have."""

import difflib


class UserError(ValueError):
    """Bad input. The message names the file, key or rank, says what is wrong and what to do.

    The command line shows the message without a traceback.
    """


def nearest(text: str, choices: list[str]) -> str:
    """Return a question that suggests the choice most similar to `text`, or an empty string."""
    same_leaf = [choice for choice in choices if choice.split(".")[-1] == text.split(".")[-1]]
    matches = same_leaf[:1] or difflib.get_close_matches(text, choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
