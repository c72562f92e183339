"""Documents that share a long run of words with an evaluation problem are left out, and the problem is named.

datatrove's own n-gram filter names a task but not the problem, and needs lighteval and a language model's word splitter.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.filters.base_filter import BaseFilter

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DecontaminateConfig, SourceConfig
from retemper.tokenize.listing import list_parts, locate

# Problems with fewer words than an n-gram are known by n-grams of this length; shorter ones are not looked for.
_SHORT_NGRAM = 8
_SEGMENT_BYTES = 1 << 20
_SEPARATOR, _SEPARATOR_BYTE = 0, b"\0"
_LOWER_WORDS = bytes(ord(chr(byte).lower()) if chr(byte).isalnum() else _SEPARATOR for byte in range(0x80)) + bytes(range(0x80, 0x100))
# Multipliers of a polynomial hash modulo 2**64; odd, so that they have inverses (Karp and Rabin 1987).
_BYTE_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_BLOOM_BITS = 22


class Problems:
    """The n-grams of evaluation problems, by hash."""

    def __init__(self, grams: dict[int, tuple[np.ndarray, np.ndarray]], names: list[str], counts: dict[str, dict[str, int]]):
        """grams: n -> (sorted hashes uint64 (grams,), index into names int32 (grams,)); counts: task -> problems, without_ngram."""
        self.grams, self.names, self.counts = grams, names, counts
        self._bloom = {n: np.zeros(1 << _BLOOM_BITS, bool) for n in grams}
        for n, (hashes, _) in grams.items():
            self._bloom[n][hashes >> np.uint64(64 - _BLOOM_BITS)] = True

    @classmethod
    def read(cls, config: DecontaminateConfig) -> "Problems":
        """Index the problems of every task. Raises UserError where a file is missing or holds none."""
        names, counts, found = [], {}, {}
        for task, path in config.tasks.items():
            counts[task] = {"problems": 0, "without_ngram": 0}
            for row, problem in enumerate(_rows(task, path)):
                index, indexed = len(names), False
                names.append(f"{task}: {next((problem[key] for key in ('task_id', 'id', 'ind') if key in problem), row)}")
                for text in _texts(problem):
                    for n, hashes in _problem_grams(text, config.ngram):
                        found.setdefault(n, []).append((hashes, np.full(len(hashes), index, np.int32)))
                        indexed = True
                counts[task]["problems"] += 1
                counts[task]["without_ngram"] += not indexed
            if not counts[task]["problems"]:
                raise UserError(f"data.decontaminate.tasks.{task}={path} holds no problem; name a jsonl or parquet file of them")
        return cls({n: _first_of_each(pieces) for n, pieces in found.items()}, names, counts)

    def save(self, path: Path) -> None:
        """Write the index for the workers."""
        arrays = {f"{part}_{n}": array for n, pair in self.grams.items() for part, array in zip(("hashes", "problems"), pair)}
        np.savez(path, names=np.array(self.names), **arrays)

    @classmethod
    @functools.cache
    def load(cls, path: Path) -> "Problems":
        """Read a saved index, once a process."""
        with np.load(path, allow_pickle=False) as saved:
            lengths = [int(key.removeprefix("hashes_")) for key in saved if key.startswith("hashes_")]
            return cls({n: (saved[f"hashes_{n}"], saved[f"problems_{n}"]) for n in lengths}, saved["names"].tolist(), {})

    @property
    def sha256(self) -> str:
        """Of the index: other problems, or another n, make another corpus."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for n in sorted(self.grams):
            digest.update(self.grams[n][0].tobytes())
        return digest.hexdigest()

    def match(self, utf8: bytes) -> tuple[str, str] | None:
        """The first problem that a document shares an n-gram with, and that n-gram; None where it shares none."""
        for segment in map(_normalised, _segments(utf8.translate(_LOWER_WORDS), max(self.grams, default=0))):
            starts, ends, words = _word_hashes(segment)
            for n in self.grams:
                hashes = _gram_hashes(words, n)
                (candidates,) = np.nonzero(self._bloom[n][hashes >> np.uint64(64 - _BLOOM_BITS)])
                if not len(candidates):
                    continue
                known, problems = self.grams[n]
                places = np.minimum(np.searchsorted(known, hashes[candidates]), len(known) - 1)
                if len(hits := np.nonzero(known[places] == hashes[candidates])[0]):
                    at = candidates[hits[0]]
                    gram = segment[starts[at] : ends[at + n - 1]].replace(_SEPARATOR_BYTE, b" ")
                    return self.names[problems[places[hits[0]]]], " ".join(gram.decode("utf-8", "replace").split())
        return None


class Decontaminate(BaseFilter):
    """Drop the documents that hold an evaluation problem; `matches` says which, and for which problem."""

    name = "🦠 Decontaminate"

    def __init__(self, problems: Path):
        super().__init__()
        self.problems = problems
        self.matches: list[dict] = []

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found = Problems.load(self.problems).match(doc.metadata["utf8"])
        if found is None:
            return True
        about = {key: _printable(value) for key, value in doc.metadata["about"].items()}
        self.matches.append({"document": doc.id, "problem": found[0], "ngram": found[1], **about})
        return False, "contaminated"


def _rows(task: str, path: str) -> Iterator[dict]:
    import pyarrow.parquet as pq

    source = SourceConfig(kind="rows", path=path)
    try:
        root, glob = locate(source)
        files = [file.path for part in list_parts(source, root, glob) for file in part]
    except UserError as error:
        raise UserError(str(error).replace("data.source.path", f"data.decontaminate.tasks.{task}")) from None
    for file in dict.fromkeys(files):
        with get_datafolder(root).open(file, "rb", compression="infer") as stream:
            try:
                yield from (
                    pq.read_table(stream).to_pylist() if file.endswith(".parquet") else map(orjson.loads, filter(bytes.strip, stream))
                )
            except ValueError as error:
                raise UserError(f"data.decontaminate.tasks.{task}: {file} cannot be read ({error}); fetch it again") from None


def _texts(value) -> Iterator[str]:
    """Every string in a problem; WinoGrande's blank is filled with each of its options."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if {"sentence", "option1", "option2"} <= value.keys():
            yield from (value["sentence"].replace("_", value[option]) for option in ("option1", "option2"))
        yield from _texts([*value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _problem_grams(text: str, ngram: int) -> Iterator[tuple[int, np.ndarray]]:
    normalised = _normalised(text.encode("utf-8", "replace"))[:_SEGMENT_BYTES]
    starts, ends, words = _word_hashes(normalised)
    n = ngram if len(words) >= ngram else _SHORT_NGRAM
    # "0 1 2 3 …" and "a b c d …" are in many problems and many honest documents.
    telling = np.array([end - start > 1 and not normalised[start:end].isdigit() for start, end in zip(starts, ends)], np.int64)
    if len(words) >= n and (kept := np.convolve(telling, np.ones(n, np.int64), "valid") * 2 >= n).any():
        yield n, _gram_hashes(words, n)[kept]


def _first_of_each(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    hashes, problems = (np.concatenate(arrays) for arrays in zip(*pieces))
    unique, first = np.unique(hashes, return_index=True)
    return unique, problems[first]


def _normalised(utf8: bytes) -> bytes:
    """Lower-case words between separators; everything that is no letter or digit separates."""
    if not utf8.isascii():
        utf8 = re.sub(r"\W+", " ", utf8.decode("utf-8", "replace").lower()).encode()
    return utf8.translate(_LOWER_WORDS)


def _segments(normalised: bytes, ngram: int) -> Iterator[bytes]:
    """A text in pieces that share the words an n-gram across the cut needs, so that memory does not grow with its length."""
    start = 0
    while start < len(normalised):
        end = min(start + _SEGMENT_BYTES, len(normalised))
        yield normalised[start:end]
        start = len(normalised) if end == len(normalised) else _words_before(normalised, start, end, ngram)


def _words_before(normalised: bytes, start: int, end: int, count: int) -> int:
    """Where the last `count` words before `end` begin; `end` itself where they are no words but half a segment of something else."""
    position = end
    for _ in range(count):
        position = start + len(normalised[start:position].rstrip(_SEPARATOR_BYTE))
        position = normalised.rfind(_SEPARATOR_BYTE, start, position)
        if position < start + _SEGMENT_BYTES // 2:
            return end
    return position


def _word_hashes(normalised: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each word starts and ends, and its hash, uint64 (words,)."""
    data = np.frombuffer(normalised, np.uint8)
    in_word = np.zeros(len(data) + 2, np.int8)
    in_word[1:-1] = data != _SEPARATOR
    edges = np.diff(in_word)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return starts, ends, np.zeros(0, np.uint64)
    powers, inverses = _powers(_BYTE_BASE, len(data))
    words = np.add.reduceat(data * powers, starts) * inverses[starts]  # separators are zero and add nothing
    return starts, ends, (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _gram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """The hash of every n words in a row, uint64 (max(0, words - n + 1),)."""
    if len(words) < n:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(_WORD_BASE, len(words))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers)])
    grams = (sums[n:] - sums[:-n]) * inverses[: len(words) - n + 1]
    return (grams ^ (grams >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)


@functools.cache
def _table(base: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = pow(base, -1, 1 << 64)
    return tuple(np.cumprod(np.array([1] + [factor] * _SEGMENT_BYTES, np.uint64)) for factor in (base, inverse))


def _powers(base: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """base**0, base**1, … modulo 2**64, and their inverses, `count` of each."""
    powers, inverses = _table(base)
    return powers[:count], inverses[:count]


def _printable(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
