"""Hashes of the words and word n-grams of a text, which documents are compared by."""

import functools
import re
from collections.abc import Iterator

import numpy as np

# A text is processed in segments of this many bytes, so that memory does not grow with its length.
SEGMENT_BYTES = 1 << 20
SEPARATOR, SEPARATOR_BYTE = 0, b"\0"
LOWER_WORDS = bytes(
    ord(chr(byte).lower()) if chr(byte).isalnum() else SEPARATOR for byte in range(0x80)
) + bytes(range(0x80, 0x100))
# Multipliers of a polynomial hash modulo 2**64 (Karp and Rabin 1987); odd, so they have inverses.
_BYTE_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_ASCII = bytes(range(0x80))
_NO_WORD = re.compile(r"\W")
_FEW_CHARACTERS = 16


def normalised(utf8: bytes) -> bytes:
    """Return a text as lower-case words between separators.

    Every character that is neither a letter nor a digit becomes a separator.
    """
    if not utf8.isascii():
        utf8 = utf8.decode("utf-8", "replace").lower().encode()
        characters = set(utf8.translate(None, _ASCII).decode())
        no_words = list(filter(_NO_WORD.match, characters))
        if len(no_words) <= _FEW_CHARACTERS:
            # This is faster than a regular expression, and most texts have few such characters,
            # such as quotes and dashes.
            for char in no_words:
                utf8 = utf8.replace(char.encode(), SEPARATOR_BYTE)
        else:
            any_of_them = f"[{re.escape(''.join(no_words))}]"
            utf8 = re.sub(any_of_them, " ", utf8.decode()).encode()
    return utf8.translate(LOWER_WORDS)


def segments(translated: bytes, ngram: int) -> Iterator[bytes]:
    """Yield a text in segments that overlap by the words of the n-grams across the cut.

    Args:
        translated: The UTF-8 text, in which each ASCII character that is neither a letter nor a
            digit is a separator, as `LOWER_WORDS` translates it.
        ngram: The number of words that consecutive segments share.
    """
    start = 0
    while start < len(translated):
        end = min(start + SEGMENT_BYTES, len(translated))
        yield translated[start:end]
        start = (
            len(translated)
            if end == len(translated)
            else _words_before(translated, start, end, ngram)
        )


def _words_before(translated: bytes, start: int, end: int, count: int) -> int:
    """Return the byte offset of the last `count` words before `end`.

    Returns `end` if these words would reach back over half of the segment or more.
    """
    position = end
    for _ in range(count):
        position = start + len(translated[start:position].rstrip(SEPARATOR_BYTE))
        position = translated.rfind(SEPARATOR_BYTE, start, position)
        if position < start + SEGMENT_BYTES // 2:
            return end
    return position


def word_hashes(words: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the start and end of each word of a normalised text, and its hash, uint64 (words,)."""
    data = np.frombuffer(words, np.uint8)
    in_word = np.zeros(len(data) + 2, bool)
    np.not_equal(data, SEPARATOR, out=in_word[1:-1])
    edges = np.flatnonzero(in_word[1:] != in_word[:-1])
    starts = edges[::2]
    ends = edges[1::2]
    powers, inverses = _powers(_BYTE_BASE, len(data))
    sums = data * powers
    np.cumsum(sums, out=sums)
    # Separators are zero and do not change the sums.
    hashes = np.diff(sums[ends - 1], prepend=np.uint64(0)) * inverses[starts]
    return starts, ends, (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def gram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of every n consecutive words, uint64 (max(0, words - n + 1),)."""
    if len(words) < n:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(_WORD_BASE, len(words))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers)])
    grams = (sums[n:] - sums[:-n]) * inverses[: len(words) - n + 1]
    return (grams ^ (grams >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)


def _powers(base: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return base**0, base**1, … modulo 2**64, and their inverses, `count` of each."""
    # A segment may become longer in lower case: Ⱥ has two bytes, ⱥ has three.
    powers, inverses = _table(base, (max(count, SEGMENT_BYTES) - 1).bit_length())
    return powers[:count], inverses[:count]


@functools.cache
def _table(base: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = pow(base, -1, 1 << 64)
    repeated = (1 << bits) - 1
    powers, inverses = (
        np.cumprod(np.array([1] + [factor] * repeated, np.uint64)) for factor in (base, inverse)
    )
    return powers, inverses
