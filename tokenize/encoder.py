"""Fast encoding of text to token ids.

The encoder is gigatoken where it produces the same ids as tokenizers, and tokenizers otherwise.
"""

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from retemper.pipeline.corpus.tokenizer import Tokenizer, sha256_here
from retemper.pipeline.errors import UserError

# The memory and time of both encoders grow out of proportion for long texts: a megabyte without a
# space needs about 40 bytes of memory per byte.
_WINDOW_BYTES = 1 << 20
_OVERLAP_BYTES = 1 << 14
# Difficult texts on which the two encoders are compared.
_HOSTILE = [
    "", " ", "\n", "\t\tx\r\n", "\0", "a\0b", " leading", "trailing ", "  two  spaces  ",
    "▁", "▁▁a▁", "<0x0A>", "\ufeffBOM", "\u2028\u2029",
    "a" * 3000, " " * 3000, "\n" * 300, "=" * 300, "1234567890" * 30,
    "é e\u0301 ﬁ ﷽ \u212b ＡＢ İı ß ſ ǅ ½ ㎒ \u1100\u1161\u11a8 각 q\u0307\u0323",
    "a\xa0b\u3000c\u202fd\x85e\x7f",
    "🎉👨‍👩‍👧‍👦🏳️‍🌈" * 9,
    "\ud7ff\ue000\U0010ffff", "\u200b\u200d\u00ad",
    "中文字符和日本語テキスト", "عربي עברית", "don't I'll we'VE",
    r"\frac{\partial^2 u}{\partial x^2} = \int_0^\infty e^{-x}\,dx",
    "def f(x):\n    return x  # ∀\n",
    # Every combining mark on both sides of another: libraries of different versions of Unicode put
    # some of them in another order.
    *(
        text
        for mark in map(chr, range(0x300, 0x1F000))
        if unicodedata.combining(mark)
        for text in (f"a{mark}\u0334b", f"a\u0345{mark}b")
    ),
]  # fmt: skip


EncoderName = Literal["gigatoken", "tokenizers"]


class Encoder:
    """An encoder of texts to token ids; special tokens that a text spells out are encoded as text.

    A document longer than a megabyte is encoded in overlapping windows, which are joined where both
    have the same tokens over the middle of the overlap: time and memory are linear in its length.
    """

    def __init__(self, folder: str | Path, name: EncoderName):
        """Load the tokenizer of a folder into one of the two libraries."""
        self.folder = folder
        self._encode = self._encode_with_tokenizers
        self.composes = False  # whether the tokenizer has the normalizer NFC
        if name == "gigatoken":
            config = _without_special_tokens(folder)
            self.composes = "NFC" in repr(config["normalizer"])
            self._gigatoken = _gigatoken(config)
            self._encode = self._encode_with_gigatoken

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The same tokenizer in the tokenizers library; it is loaded when it is first used."""
        return Tokenizer(self.folder)

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return self.tokenizer.token_bytes()

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """Return the ids of each UTF-8 text, integer (tokens,), without special tokens."""
        short = iter(self._encode([text for text in texts if len(text) <= _WINDOW_BYTES]))
        return [
            next(short) if len(text) <= _WINDOW_BYTES else self._encode_long(text) for text in texts
        ]

    def _encode_with_gigatoken(self, texts: list[bytes]) -> list[np.ndarray]:
        """Encode, with tokenizers, the texts that NFC changes.

        The two libraries have it of different versions of Unicode.
        """
        if not self.composes:
            return self._gigatoken(texts)
        is_fast = [unicodedata.is_normalized("NFC", text.decode()) for text in texts]
        fast = iter(self._gigatoken([text for text, here in zip(texts, is_fast) if here]))
        slow = iter(
            self._encode_with_tokenizers([text for text, here in zip(texts, is_fast) if not here])
        )
        return [next(fast) if here else next(slow) for here in is_fast]

    def _encode_with_tokenizers(self, texts: list[bytes]) -> list[np.ndarray]:
        if not texts:
            return []
        ids = self.tokenizer.encode([text.decode() for text in texts])
        return [np.array(ids_of_text, np.uint32) for ids_of_text in ids]

    def _encode_long(self, text: bytes) -> np.ndarray:
        parts: list[np.ndarray] = []
        before = self._window(text, 0, _character_start(text, _WINDOW_BYTES))
        for start in range(_WINDOW_BYTES, len(text), _WINDOW_BYTES):
            cut, end = (
                _character_start(text, position) for position in (start, start + _WINDOW_BYTES)
            )
            # At the end of a token: so a long repetition is cut as in the window before.
            begin = before.first_end(start - _OVERLAP_BYTES)
            window = self._window(text, _character_start(text, begin), end)
            if joint := _joint(before, window, cut):
                before = before.before(joint)
                window = window.after(joint)
            else:
                # The windows still encode the text, but at this one position the tokens differ
                # from those of the whole text.
                window = self._window(text, cut, end)
            parts.append(before.ids.astype(self.tokenizer.dtype))
            before = window
        return np.concatenate([*parts, before.ids], dtype=self.tokenizer.dtype, casting="unsafe")

    def _window(self, text: bytes, begin: int, end: int) -> "_Window":
        (ids,) = self._encode([text[begin:end]])
        sizes = self._token_bytes[ids].astype(np.int64)
        # Counted from the end, because a tokenizer may insert a space before the text.
        ends = end - (sizes.sum() - np.cumsum(sizes))
        if not end - begin <= sizes.sum() <= end - begin + 1:
            # The text has other bytes than its tokens, as where it spells out the mark of a space.
            ids, ends = self._ids_and_ends(text[begin:end])
            ends += begin
        return _Window(begin, ids, ends)

    def _ids_and_ends(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that tokenizers gives, and the byte offset at which each ends."""
        encoding = self.tokenizer.backend.encode(text.decode(), add_special_tokens=False)
        is_start = np.frombuffer(text, np.uint8) & 0xC0 != 0x80
        starts = np.append(np.flatnonzero(is_start), len(text))  # of each character
        ends = starts[[end for _, end in encoding.offsets]]
        return np.array(encoding.ids, np.uint32), np.maximum.accumulate(ends)


@dataclass(frozen=True)
class _Window:
    """The ids of text[begin:...], and the byte offset in the text at which each ends."""

    begin: int
    ids: np.ndarray
    ends: np.ndarray

    def first_end(self, offset: int) -> int:
        """Return the first end of a token from an offset on, or the offset if there is none."""
        ends = self.ends[self.ends >= offset]
        return int(ends[0]) if len(ends) else offset

    def before(self, offset: int) -> "_Window":
        count = np.searchsorted(self.ends, offset, "right")
        return _Window(self.begin, self.ids[:count], self.ends[:count])

    def after(self, offset: int) -> "_Window":
        count = np.searchsorted(self.ends, offset, "right")
        return _Window(self.begin, self.ids[count:], self.ends[count:])


def _joint(first: _Window, second: _Window, cut: int) -> int | None:
    """Return the byte offset, at a token boundary, at which two overlapping windows can be joined.

    It is in the middle of the overlap, and both windows must have the same tokens over the half of
    the overlap around it. Returns None if they do not.
    """
    quarter = (cut - second.begin) // 4
    of_first, of_second = (
        window.ends[(window.ends >= second.begin + quarter) & (window.ends <= cut - quarter)]
        for window in (first, second)
    )
    common = np.intersect1d(of_first, of_second)
    if len(common) < 2:
        return None
    of_first, of_second = (
        window.after(common[0]).before(common[-1]).ids for window in (first, second)
    )
    return int(common[len(common) // 2]) if np.array_equal(of_first, of_second) else None


def choose_encoder(tokenizer: Tokenizer, documents: list[str]) -> dict:
    """Return which encoder a corpus is encoded with, and why, as an entry for its manifest.

    That is gigatoken if its ids equal those of tokenizers on every document in `documents` and on
    a list of difficult strings.
    """
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    marks = [token for token in tokenizer.backend.get_vocab() if token[:1] + token[-1:] == "<>"]
    strings = [
        *_HOSTILE,
        *(f"x{token}y {token} {token}" for token in dict.fromkeys([*added, *marks])),
    ]
    try:
        encoder = load_encoder(str(tokenizer.folder), tokenizer.sha256, "gigatoken")
        ids_of_texts = encoder.encode([text.encode() for text in [*strings, *documents]])
    except Exception as error:  # a Rust library: tokenizers does whatever gigatoken cannot
        return {
            "name": "tokenizers",
            "reason": f"gigatoken cannot load this tokenizer: {str(error).splitlines()[0]}",
        }
    for text, ids, expected in zip(
        [*strings, *documents], ids_of_texts, tokenizer.encode([*strings, *documents]), strict=True
    ):
        if ids.tolist() != expected:
            return {"name": "tokenizers", "reason": f"gigatoken gives other ids for {text[:60]!r}"}
    checked = {"documents": len(documents), "strings": len(strings)}
    why = {"version": version("gigatoken"), "equal_to_tokenizers_on": checked}
    # NFC has another version of Unicode in each of the two.
    others = {"texts_not_in_nfc": "tokenizers"} if encoder.composes else {}
    return {"name": "gigatoken", **why, **others}


@functools.lru_cache(maxsize=1)
def load_encoder(folder: str, sha256: str, name: EncoderName) -> Encoder:
    """Return the encoder of this process.

    It is cached: a task would load it again, and its cache of words makes it faster over time.

    Args:
        folder: The folder of the tokenizer.
        sha256: The expected hash of its tokenizer.json.
        name: gigatoken or tokenizers.

    Raises:
        UserError: The tokenizer changed while the job ran.
    """
    if sha256_here(folder) != sha256:
        raise UserError(
            f"{folder}/tokenizer.json changed while the job ran: restore the old one, or remove "
            "the job's folder and start again"
        )
    return Encoder(folder, name)


def _without_special_tokens(folder: str | Path) -> dict:
    """Return tokenizer.json for gigatoken, which would encode their spelling as the tokens."""
    config = orjson.loads(Path(folder, "tokenizer.json").read_bytes())
    config["added_tokens"] = [token for token in config["added_tokens"] if not token["special"]]
    config["post_processor"] = None
    return config


def _gigatoken(config: dict) -> Callable[[list[bytes]], list[np.ndarray]]:
    import gigatoken

    backend = gigatoken.Tokenizer.from_json(orjson.dumps(config))

    def encode(texts: list[bytes]) -> list[np.ndarray]:
        if not texts:
            return []
        layout = backend.encode_batch(texts, parallel=False).layout
        ids = np.asarray(layout.content.data)
        ends = np.asarray(layout.offsets.data)
        return [ids[start:end] for start, end in zip(ends, ends[1:])]

    return encode


def _character_start(text: bytes, position: int) -> int:
    """Return the start of the UTF-8 character at a byte position, or the end of the text."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return min(position, len(text))
