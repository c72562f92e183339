"""Which documents a corpus leaves out, as a datatrove filter: each rule can be switched and counts what it dropped."""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from retemper.pipeline.schema.data import CleanConfig

_HEAD_LINES = 5
# The words by which BigCode's preparation of The Stack knew generated files.
_GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|@generated|generated (?:by|from|using) |do not edit",
    re.IGNORECASE,
)
# Codex (arXiv 2107.03374) and The Stack dropped files with longer lines.
_MAX_LINE_CHARS, _MAX_MEAN_LINE_CHARS = 1000, 100


class Clean(BaseFilter):
    """Forward the documents that keep every rule; `dropped_<rule>` counts the others."""

    name = "🧹 Clean"

    def __init__(self, rules: CleanConfig):
        super().__init__()
        self.rules = rules

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if reason := self._broken_rule(doc.text, doc.metadata["prompt_chars"]):
            return False, reason
        return True

    def _broken_rule(self, text: str, prompt_chars: int) -> str | None:
        rules = self.rules
        trained_on = text[prompt_chars:] if prompt_chars else text
        if not trained_on or trained_on.isspace():
            return "empty"
        if rules.min_chars > 1 and len(trained_on.strip()) < rules.min_chars:
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
    """Whether the first lines say that a program wrote the code."""
    head = "\n".join(code[:2000].split("\n", _HEAD_LINES)[:_HEAD_LINES])
    return _GENERATED.search(head) is not None


def is_minified(code: str) -> bool:
    """Whether lines are longer than people write them."""
    lines = code.split("\n")
    return len(code) > _MAX_MEAN_LINE_CHARS * len(lines) or max(map(len, lines)) > _MAX_LINE_CHARS
