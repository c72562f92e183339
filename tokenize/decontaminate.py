"""Decontamination: drop the documents that share a long n-gram of words with an evaluation problem.

The matched problem is recorded. datatrove's own n-gram filter records only the task, and needs
lighteval and the word tokenizer of a language.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.filters.base_filter import BaseFilter

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DecontaminateConfig, SourceConfig
from retemper.tokenize.json_records import json_records
from retemper.tokenize.listing import list_parts, locate
from retemper.tokenize.ngrams import (
    LOWER_WORDS,
    SEGMENT_BYTES,
    SEPARATOR_BYTE,
    gram_hashes,
    normalised,
    segments,
    word_hashes,
)

# Problems without an n-gram of the configured length are matched by n-grams of this length instead;
# still shorter problems are not matched.
_SHORT_NGRAM = 8
_BLOOM_BITS = 22


class Problems:
    """An index of the n-grams of evaluation problems, by hash."""

    def __init__(
        self,
        grams: dict[int, tuple[np.ndarray, np.ndarray]],
        names: list[str],
        counts: dict[str, dict[str, int]],
    ):
        """Build the index.

        Args:
            grams: For each n, the sorted hashes of the n-grams, uint64 (grams,), and the index in
                `names` of the problem that each belongs to, int32 (grams,).
            names: The name of each problem.
            counts: For each task, the number of `problems` and of those `without_ngram`.
        """
        self.grams = grams
        self.names = names
        self.counts = counts
        self._bloom = {n: np.zeros(1 << _BLOOM_BITS, bool) for n in grams}
        for n, (hashes, _) in grams.items():
            self._bloom[n][hashes >> np.uint64(64 - _BLOOM_BITS)] = True

    @classmethod
    def read(cls, config: DecontaminateConfig) -> "Problems":
        """Index the problems of every task.

        Raises:
            UserError: A file is missing, cannot be read, or contains no problem.
        """
        names: list[str] = []
        counts = {}
        hashes_of_length: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for task, path in config.tasks.items():
            counts[task] = {"problems": 0, "without_ngram": 0}
            for row, problem in enumerate(_rows(task, path)):
                n, hashes = _problem_grams(problem, config.ngram)
                if len(hashes):
                    owners = np.full(len(hashes), len(names), np.int32)
                    hashes_of_length.setdefault(n, []).append((hashes, owners))
                id_keys = (key for key in ("task_id", "id", "ind") if key in problem)
                names.append(f"{task}: {next((problem[key] for key in id_keys), row)}")
                counts[task]["problems"] += 1
                counts[task]["without_ngram"] += not len(hashes)
            if not counts[task]["problems"]:
                raise UserError(
                    f"data.decontaminate.tasks.{task}={path} holds no problem; "
                    "name a jsonl or parquet file with problems"
                )
        grams = {n: _first_of_each(pieces) for n, pieces in hashes_of_length.items()}
        return cls(grams, names, counts)

    def save(self, path: Path) -> None:
        """Write the index to a file, for the workers."""
        arrays = {
            f"{part}_{n}": array
            for n, pair in self.grams.items()
            for part, array in zip(("hashes", "problems"), pair)
        }
        np.savez(path, names=np.array(self.names), **arrays)

    @classmethod
    @functools.cache
    def load(cls, path: Path) -> "Problems":
        """Read a saved index; each process reads it once."""
        with np.load(path, allow_pickle=False) as saved:
            lengths = [
                int(key.removeprefix("hashes_")) for key in saved if key.startswith("hashes_")
            ]
            return cls(
                {n: (saved[f"hashes_{n}"], saved[f"problems_{n}"]) for n in lengths},
                saved["names"].tolist(),
                {},
            )

    @property
    def sha256(self) -> str:
        """The hash of the index, which is part of what a corpus was made from."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for n in sorted(self.grams):
            digest.update(self.grams[n][0].tobytes())
        return digest.hexdigest()

    def match(self, utf8: bytes) -> tuple[str, str] | None:
        """Find a problem that a document shares an n-gram with.

        Returns:
            The name of the problem that the first match belongs to, and the n-gram; None if the
            document shares no n-gram with any problem.
        """
        translated = utf8.translate(LOWER_WORDS)
        for segment in map(normalised, segments(translated, max(self.grams, default=0))):
            starts, ends, words = word_hashes(segment)
            for n in self.grams:
                hashes = gram_hashes(words, n)
                (candidates,) = np.nonzero(self._bloom[n][hashes >> np.uint64(64 - _BLOOM_BITS)])
                if not len(candidates):
                    continue
                known, problems = self.grams[n]
                indices = np.minimum(np.searchsorted(known, hashes[candidates]), len(known) - 1)
                if len(hits := np.nonzero(known[indices] == hashes[candidates])[0]):
                    word = candidates[hits[0]]
                    gram = segment[starts[word] : ends[word + n - 1]].replace(SEPARATOR_BYTE, b" ")
                    return self.names[problems[indices[hits[0]]]], " ".join(
                        gram.decode("utf-8", "replace").split()
                    )
        return None


class Decontaminate(BaseFilter):
    """Drop the documents that match an evaluation problem; `matches` lists both."""

    name = "🦠 Decontaminate"

    def __init__(self, problems: Path):
        super().__init__()
        self.problems = problems
        self.matches: list[dict] = []

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        match = Problems.load(self.problems).match(doc.metadata["utf8"])
        if match is None:
            return True
        problem, ngram = match
        about = {key: _printable(value) for key, value in doc.metadata["about"].items()}
        self.matches.append({"document": doc.id, "problem": problem, "ngram": ngram, **about})
        return False, "contaminated"


def _rows(task: str, path: str) -> Iterator[dict]:
    import pyarrow.parquet as pq

    source = SourceConfig(kind="rows", path=path)
    try:
        root, glob = locate(source)
        parts, _left_out = list_parts(source, root, glob)
    except UserError as error:
        raise UserError(
            str(error).replace("data.source.path", f"data.decontaminate.tasks.{task}")
        ) from None
    folder = get_datafolder(root)
    for file in [replace(file, end=file.size) for part in parts for file in part if not file.start]:
        try:
            if file.path.endswith(".parquet"):
                with folder.open(file.path, "rb") as stream:
                    yield from pq.read_table(stream).to_pylist()
            else:
                yield from (orjson.loads(record) for _, record in json_records(folder, file))
        except ValueError as error:
            raise UserError(
                f"data.decontaminate.tasks.{task}: {file.path} cannot be read ({error}); "
                "download it again"
            ) from None


def _texts(value: object) -> Iterator[str]:
    """Yield every string in a problem; WinoGrande's blank is filled with each of its options."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if {"sentence", "option1", "option2"} <= value.keys():
            yield from (
                value["sentence"].replace("_", value[option]) for option in ("option1", "option2")
            )
        yield from _texts([*value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _problem_grams(problem: dict, ngram: int) -> tuple[int, np.ndarray]:
    """Return the n of the n-grams that match a problem, and their hashes, uint64 (n-grams,)."""
    texts = [
        normalised(text.encode("utf-8", "replace"))[:SEGMENT_BYTES] for text in _texts(problem)
    ]
    texts_and_words = [(text, *word_hashes(text)) for text in texts]
    for n in (ngram, _SHORT_NGRAM):
        distinctive = [
            _distinctive_grams(text, starts, ends, words, n)
            for text, starts, ends, words in texts_and_words
            if len(words) >= n
        ]
        hashes = np.concatenate([np.zeros(0, np.uint64), *distinctive])
        if len(hashes):
            break
    return n, hashes


def _distinctive_grams(
    text: bytes, starts: np.ndarray, ends: np.ndarray, words: np.ndarray, n: int
) -> np.ndarray:
    """Return the hashes of the distinctive n-grams of a text.

    In these at least half of the words are neither numbers nor single letters.
    """
    # "0 1 2 3 …" and "a b c d …" occur in many problems and in many uncontaminated documents.
    is_distinctive = [
        end - start > 1 and not text[start:end].isdigit() for start, end in zip(starts, ends)
    ]
    counts = np.convolve(np.array(is_distinctive, np.int64), np.ones(n, np.int64), "valid")
    return gram_hashes(words, n)[counts * 2 >= n]


def _first_of_each(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct hashes in ascending order, and the first problem that has each."""
    hashes, problems = (np.concatenate(arrays) for arrays in zip(*pieces))
    unique, first = np.unique(hashes, return_index=True)
    return unique, problems[first]


def _printable(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
