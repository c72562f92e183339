"""The cleaning rules as a datatrove filter.

Each rule can be switched off and counts the documents that it drops.
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from retemper.pipeline.schema.data import CleanConfig

_HEAD_LINES = 5
# The phrases by which BigCode's preparation of The Stack recognized generated files.
_GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|@generated|generated (?:by|from|using) "
    r"|do not edit",
    re.IGNORECASE,
)
# Codex (arXiv 2107.03374) and The Stack dropped files with longer lines than these.
_MAX_LINE_CHARS, _MAX_MEAN_LINE_CHARS = 1000, 100
# The line that StarCoder's training put before half of its files (arXiv 2305.06161, section 5.1),
# any of the three: <reponame>REPONAME<filename>FILENAME<gh_stars>STARS
_REPOSITORY_MARKS = re.compile(
    r"(?=<(?:reponame|filename|gh_stars)>)"
    r"(?:<reponame>[^<\n]+)?(?:<filename>[^<\n]+)?(?:<gh_stars>[^<\n]+)?(?:\n|\Z)"
)


class Clean(BaseFilter):
    """Forward the documents that satisfy every rule; `dropped_<rule>` counts the others.

    `repository_marks` counts the documents that begin with them.
    """

    name = "🧹 Clean"

    def __init__(self, rules: CleanConfig):
        super().__init__()
        self.rules = rules

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if marks := _REPOSITORY_MARKS.match(doc.text, doc.metadata["prompt_chars"]):
            self.stat_update("repository_marks")
            if self.rules.repository_marks == "strip":
                doc.text = doc.text[: marks.start()] + doc.text[marks.end() :]
        if reason := self._broken_rule(doc.text, doc.metadata["prompt_chars"]):
            return False, reason
        return True

    def _broken_rule(self, text: str, prompt_chars: int) -> str | None:
        rules = self.rules
        response = text[prompt_chars:] if prompt_chars else text
        if not response or response.isspace():
            return "empty"
        if rules.min_chars > 1 and len(response.strip()) < rules.min_chars:
            return "too_short"
        if rules.max_chars is not None and len(text) > rules.max_chars:
            return "too_long"
        if rules.nul_bytes and "\0" in text:
            return "nul_bytes"
        if rules.minified and is_minified(text):
            return "minified"
        if rules.generated and is_generated(text):
            return "generated"
        return None


def is_generated(code: str) -> bool:
    """Return whether the first lines mark the code as written by a program."""
    head = "\n".join(code[:2000].split("\n", _HEAD_LINES)[:_HEAD_LINES])
    return _GENERATED.search(head) is not None


def is_minified(code: str) -> bool:
    """Return whether the longest line or the mean line is longer than people write code."""
    lines = code.split("\n")
    return len(code) > _MAX_MEAN_LINE_CHARS * len(lines) or max(map(len, lines)) > _MAX_LINE_CHARS
