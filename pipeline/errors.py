"""The exception that is shown to the user, and what its messages may and may not contain."""

import difflib
import os
import re

# Where a URL has a user or password, scheme://USER:PASSWORD@host, with unquoted "/" in it, too; a
# port is none. And a parameter of its query that is a key or a signature.
_IN_URL = re.compile(
    r"""(?<=://)(?:[^/\s'"]*@|[^/\s'"@:[{]+:(?!\d+\b)(?:[^\s'"]*@|[^\s'"/]*))"""
    r"""|(?<=[?&])((?:[\w-]*(?:key\w*|token|secret|sig|signature|password|credential))=)"""
    r"""[^&\s'"]+""",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"_KEY$|TOKEN$|SECRET|PASSWORD|PASSWD|CREDENTIAL")
_SHORTEST_SECRET = 8  # characters; a shorter value of such a variable is a word, as "true"


class UserError(ValueError):
    """Bad input. The message names the file, key or rank, says what is wrong and what to do.

    The command line shows the message without a traceback. Credentials in it are masked.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


def masked(text: str) -> str:
    """Return a text with *** for each credential of a URL, and of the environment's variables."""
    for name, value in os.environ.items():
        is_long = len(value) >= _SHORTEST_SECRET
        if is_long and _SECRET_NAME.search(name) and value in text and not os.path.exists(value):
            text = text.replace(value, "***")
    return _IN_URL.sub(lambda found: f"{found[1]}***" if found[1] else "***@", text)


def nearest(text: str, choices: list[str]) -> str:
    """Return a question that suggests the choice most similar to `text`, or an empty string."""
    same_leaf = [choice for choice in choices if choice.split(".")[-1] == text.split(".")[-1]]
    matches = same_leaf[:1] or difflib.get_close_matches(text, choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
