"""Text to token ids, fast: gigatoken where it gives the ids that tokenizers gives, tokenizers itself elsewhere."""

import functools
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError

# Both encoders take memory and time beyond proportion for a megabyte without a space (about 40 bytes a byte).
_WINDOW_BYTES = 1 << 20
_OVERLAP_BYTES = 1 << 14
_HOSTILE = [
    "", " ", "\n", "\t\tx\r\n", "\0", "a\0b", " leading", "trailing ", "  two  spaces  ", "▁", "▁▁a▁", "<0x0A>", "\ufeffBOM", "\u2028\u2029",
    "a" * 3000, " " * 3000, "\n" * 300, "=" * 300, "1234567890" * 30, "é e\u0301 ﬁ ﷽", "🎉👨‍👩‍👧‍👦🏳️‍🌈" * 9, "\ud7ff\ue000\U0010ffff", "\u200b\u200d\u00ad",
    "中文字符和日本語テキスト", "عربي עברית", "don't I'll we'VE", r"\frac{\partial^2 u}{\partial x^2} = \int_0^\infty e^{-x}\,dx", "def f(x):\n    return x  # ∀\n",
]  # fmt: skip


class Encoder:
    """Token ids of texts, without special tokens, whatever the text spells out.

    A document longer than a megabyte is encoded in overlapping windows, joined where both give the same tokens over the
    middle of the overlap: time and memory grow with its length only.
    """

    def __init__(self, tokenizer: Tokenizer, name: Literal["gigatoken", "tokenizers"]):
        self.tokenizer = tokenizer
        self._encode = (
            _gigatoken(tokenizer)
            if name == "gigatoken"
            else functools.partial(_tokenizers, tokenizer)
        )
        self._token_bytes = tokenizer.token_bytes()

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """Ids of UTF-8 texts, integer arrays (tokens,)."""
        short = iter(self._encode([text for text in texts if len(text) <= _WINDOW_BYTES]))
        return [
            next(short) if len(text) <= _WINDOW_BYTES else self._encode_long(text) for text in texts
        ]

    def _encode_long(self, text: bytes) -> np.ndarray:
        parts: list[np.ndarray] = []
        before = None
        for start in range(0, len(text), _WINDOW_BYTES):
            cut, end = (
                _character_start(text, position) for position in (start, start + _WINDOW_BYTES)
            )
            window = self._window(text, _character_start(text, max(0, start - _OVERLAP_BYTES)), end)
            if before:
                if joint := _joint(before, window, cut):
                    before = before.before(joint)
                    window = window.after(joint)
                else:  # what the windows hold is still the text, in other tokens than the whole would have at this one place
                    window = self._window(text, cut, end)
                parts.append(before.ids.astype(self.tokenizer.dtype))
            before = window
        return np.concatenate([*parts, before.ids], dtype=self.tokenizer.dtype, casting="unsafe")

    def _window(self, text: bytes, begin: int, end: int) -> "_Window":
        (ids,) = self._encode([text[begin:end]])
        sizes = self._token_bytes[ids].astype(np.int64)
        # Counted from the end: a tokenizer may put a space before the text.
        return _Window(
            begin,
            ids,
            end - (sizes.sum() - np.cumsum(sizes)),
            exact=end - begin <= sizes.sum() <= end - begin + 1,
        )


@dataclass(frozen=True)
class _Window:
    """Ids of text[begin:...], and the byte offset in the text where each ends; not exact where bytes are lost in encoding."""

    begin: int
    ids: np.ndarray
    ends: np.ndarray
    exact: bool

    def before(self, offset: int) -> "_Window":
        count = np.searchsorted(self.ends, offset) + 1
        return _Window(self.begin, self.ids[:count], self.ends[:count], self.exact)

    def after(self, offset: int) -> "_Window":
        count = np.searchsorted(self.ends, offset) + 1
        return _Window(self.begin, self.ids[count:], self.ends[count:], self.exact)


def _joint(first: _Window, second: _Window, cut: int) -> int | None:
    """The middle of the overlap, at a token boundary, where both windows give the same tokens over the half around it."""
    quarter = (cut - second.begin) // 4
    inner = [
        window.ends[(window.ends >= second.begin + quarter) & (window.ends <= cut - quarter)]
        for window in (first, second)
    ]
    common = np.intersect1d(*inner)
    if not (first.exact and second.exact) or len(common) < 2:
        return None
    stretches = [window.after(common[0]).before(common[-1]).ids for window in (first, second)]
    return int(common[len(common) // 2]) if np.array_equal(*stretches) else None


def choose_encoder(tokenizer: Tokenizer, documents: list[str]) -> dict:
    """Which encoder this corpus gets, and why: gigatoken where every sample document and hostile string agrees with tokenizers."""
    strings = [
        *_HOSTILE,
        *(
            f"x{token}y {token}"
            for token in tokenizer.backend.get_vocab()
            if token.startswith("<") and token.endswith(">")
        ),
    ]
    try:
        found = _gigatoken(tokenizer)([text.encode() for text in [*strings, *documents]])
    except Exception as error:  # a Rust library's loader: whatever it cannot do, tokenizers does
        return {
            "name": "tokenizers",
            "reason": f"gigatoken cannot load this tokenizer: {str(error).splitlines()[0]}",
        }
    for text, ids, expected in zip(
        [*strings, *documents], found, tokenizer.encode([*strings, *documents]), strict=True
    ):
        if ids.tolist() != expected:
            return {"name": "tokenizers", "reason": f"gigatoken gives other ids for {text[:60]!r}"}
    checked = {"documents": len(documents), "strings": len(strings)}
    return {"name": "gigatoken", "version": version("gigatoken"), "equal_to_tokenizers_on": checked}


@functools.lru_cache(maxsize=1)
def load_encoder(folder: str, sha256: str, name: str) -> Encoder:
    """The encoder of this process: loading it takes a second, and it grows faster as it meets words again. Raises UserError."""
    tokenizer = Tokenizer(folder)
    if tokenizer.sha256 != sha256:
        raise UserError(
            f"{folder}/tokenizer.json changed while the job ran: put the old one back, or remove the job's folder and start again"
        )
    return Encoder(tokenizer, name)


def _gigatoken(tokenizer: Tokenizer):
    import gigatoken

    # It would read special tokens that a text spells out as the tokens themselves.
    config = json.loads((tokenizer.folder / "tokenizer.json").read_bytes())
    config["added_tokens"] = [token for token in config["added_tokens"] if not token["special"]]
    config["post_processor"] = None
    backend = gigatoken.Tokenizer.from_json(json.dumps(config))

    def encode(texts: list[bytes]) -> list[np.ndarray]:
        if not texts:
            return []
        layout = backend.encode_batch(texts, parallel=False).layout
        ids = np.asarray(layout.content.data)
        ends = np.asarray(layout.offsets.data)
        return [ids[start:end] for start, end in zip(ends, ends[1:])]

    return encode


def _tokenizers(tokenizer: Tokenizer, texts: list[bytes]) -> list[np.ndarray]:
    return (
        [np.array(ids, np.uint32) for ids in tokenizer.encode([text.decode() for text in texts])]
        if texts
        else []
    )


def _character_start(text: bytes, position: int) -> int:
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return min(position, len(text))
