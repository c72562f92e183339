"""Shards of mosaicml-streaming's MDS format, version 2, with the columns of `retemper tokenize`.

The reader of streaming opens the file and parses the columns' types for every sample, which is most
of its time, and its import costs each rank 7 seconds and 400 MB (docs/dev/log.md).
tests/unit/test_mds.py verifies that this reader returns the same.
"""

import os
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from retemper.pipeline.corpus.format import PIECES
from retemper.pipeline.errors import UserError

# The names of shards that `retemper tokenize` writes. A name in an index becomes a path, so no
# other name is accepted.
_NAMES = re.compile(r"\d{5}/shard\.\d{5}\.mds")


class Samples:
    """The contents of some samples, N of T tokens each.

    tokens: int64 (N * T + 1,), with a zero after the last, so that tokens[1:] are the labels of
        tokens[:-1].
    pieces: lengths, documents and prompt_lengths -> the values of each sample in that column, as
        little-endian bytes.
    """

    def __init__(self, count: int, seq_length: int):
        """Allocate samples that are still to be read."""
        self.seq_length = seq_length
        self.tokens = np.empty(count * seq_length + 1, np.int64)
        self.tokens[-1] = 0
        self.pieces = {column: [b""] * count for column in PIECES}

    def __len__(self) -> int:
        return len(self.pieces["lengths"])

    @property
    def tokens_NT(self) -> np.ndarray:
        """The tokens as an array (N, T), a view of `tokens`."""
        return self.tokens[:-1].reshape(-1, self.seq_length)

    def mask_sample(self, row: int) -> None:
        """Exclude a sample from the loss: it becomes one prompt of zeros."""
        whole = np.array([self.seq_length], PIECES["lengths"]).tobytes()
        self.tokens_NT[row] = 0
        for column, content in {
            "lengths": whole,
            "documents": b"",
            "prompt_lengths": whole,
        }.items():
            self.pieces[column][row] = content

    def values(self, column: str, row: int | None = None) -> np.ndarray:
        """Return the concatenated values of a column of pieces, for one sample or for all."""
        pieces = self.pieces[column]
        return np.frombuffer(b"".join(pieces) if row is None else pieces[row], PIECES[column])


@dataclass(frozen=True)
class Shard:
    """One shard, as described by an index.

    name: path of the uncompressed shard, relative to the split's folder.
    stored_as: path of the file at the source.
    """

    name: str
    stored_as: str
    bytes: int  # uncompressed
    sha256: str  # of the uncompressed file
    samples: int
    # For each column its name, the type of its values, and its size in bytes if that is fixed.
    columns: tuple[tuple[str, np.dtype, int | None], ...]

    @classmethod
    def from_index(cls, entry: dict) -> "Shard":
        """Parse one entry of an index.

        Raises:
            ValueError: for an entry that `retemper tokenize` does not write.
            TypeError, KeyError, AttributeError: for an entry of another structure.
        """
        if (entry["version"], entry["format"]) != (2, "mds"):
            raise ValueError(f"it has format {entry['format']}, version {entry['version']}")
        raw = entry["raw_data"]
        stored = entry["zip_data"] or entry["raw_data"]
        name = raw["basename"]
        compression = entry["compression"]
        if not _NAMES.fullmatch(name) or stored["basename"] != name + (
            ".zstd" if compression else ""
        ):
            raise ValueError(f"it names the shard {name!r}, stored as {stored['basename']!r}")
        if compression and compression.partition(":")[0] != "zstd":
            raise ValueError(f"{name} is compressed by {compression}")
        if not 1 <= entry["samples"] <= raw["bytes"]:
            raise ValueError(
                f"it has a shard of {entry['samples']} samples in {raw['bytes']} bytes"
            )
        if "sha256" not in raw["hashes"]:
            raise ValueError(f"it has no sha256 of {name}")
        described = zip(
            entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True
        )
        columns = tuple(
            (column, _type_of(column, encoding), size) for column, encoding, size in described
        )
        return cls(
            name,
            stored["basename"],
            raw["bytes"],
            raw["hashes"]["sha256"],
            entry["samples"],
            columns,
        )

    @property
    def is_compressed(self) -> bool:
        """Whether the file at the source is compressed."""
        return self.stored_as != self.name


def _type_of(column: str, encoding: str) -> np.dtype:
    if column in PIECES and encoding == "bytes":
        return np.dtype(PIECES[column])
    if column == "tokens" and (kind := re.fullmatch(r"ndarray:(uint16|uint32):\d+", encoding)):
        return np.dtype(kind[1])
    raise ValueError(f"it has a column {column} of type {encoding}")


class ShardFile:
    """An open, uncompressed shard. Several threads may read at once."""

    def __init__(self, shard: Shard, file: BinaryIO):
        self._shard = shard
        self._file = file
        # Layout of the file: the number of samples, the start of each and the end of the last
        # (uint32), the columns as JSON, the samples.
        self._offsets = np.frombuffer(
            os.pread(file.fileno(), 4 * (shard.samples + 1), 4), "<u4"
        ).tolist()
        self._sizes = struct.Struct(f"<{sum(size is None for _, _, size in shard.columns)}I")

    def read(self, numbers: list[int], into: Samples, rows: list[int]) -> None:
        """Read samples into rows of `into`.

        A sample consists of the sizes of its variable columns (uint32), then of all columns.

        Args:
            numbers: numbers of the samples within the shard.
            into: the samples to write to.
            rows: the row for each number.

        Raises:
            UserError: where the file was truncated after it was opened.
        """
        file = self._file.fileno()
        offsets = self._offsets
        columns = self._shard.columns
        tokens_NT = into.tokens_NT
        has_prompts = any(column == "prompt_lengths" for column, _, _ in columns)
        for row, number in zip(rows, numbers, strict=True):
            begin = offsets[number]
            end = offsets[number + 1]
            data = os.pread(file, end - begin, begin)
            if len(data) != end - begin:
                raise UserError(
                    f"{self._file.name} was cut off while it was read: "
                    "start again to fetch it again"
                )
            sizes = iter(self._sizes.unpack_from(data))
            position = self._sizes.size
            for column, kind, size in columns:
                size = next(sizes) if size is None else size
                if column == "tokens":
                    tokens_NT[row] = np.frombuffer(data, kind, into.seq_length, position)
                else:
                    into.pieces[column][row] = data[position : position + size]
                position += size
            if not has_prompts:
                # Zeros: these samples have no prompts.
                into.pieces["prompt_lengths"][row] = bytes(len(into.pieces["lengths"][row]))
