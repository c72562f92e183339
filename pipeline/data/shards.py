"""Samples of a split by id, through mosaicml-streaming's MDS reader; every shard is checked against its hash when it is opened."""

import bisect
import contextlib
import copy
import fcntl
import hashlib
import itertools
import json
import os
import re
import socket
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.reader import MDSReader

from retemper.pipeline.data import store
from retemper.pipeline.data.manifest import read_listed, read_manifest
from retemper.pipeline.errors import UserError

# Columns that hold a value for each piece of a document in the sample (tokenize/shards.py writes them).
_PIECES = {"lengths": "<u4", "documents": "<u8", "prompt_lengths": "<u4"}
# What `retemper tokenize` calls its shards. A name of an index becomes a path: nothing else is taken.
_NAMES = re.compile(r"\d{5}/shard\.\d{5}\.mds(\.zstd)?")
_MOST_OPEN = 64  # shards of one split, each a file descriptor; a rank that reads every lane has about four of each in use


class BadShard(UserError):
    """A shard is not what was written, at its source too."""


class TokenShards:
    """One split of a corpus. Threads may read at once."""

    def __init__(self, path: str | Path, split: str, cache: Path | None = None):
        """Read the index of `path/split`. Remote and compressed shards are kept below `cache`, by default for this object's life.

        Raises UserError where the corpus is missing or its index is not the one that was written.
        """
        self.path, self.source = str(path), f"{path}/{split}"
        self.manifest = read_manifest(self.path)
        self._temporary = None if cache else tempfile.TemporaryDirectory(prefix="retemper-shards-")
        self._cache = Path(cache or self._temporary.name, split)
        self._readers = _readers(read_listed(self.path, self.manifest, f"{split}/index.json"), self.source)
        self._ends = list(itertools.accumulate(reader.samples for reader in self._readers))
        self._open: dict[int, _Reader] = {}
        self.bad: dict[int, str] = {}  # found so, and what was said: they are not tried again
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in self._readers]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(reader.samples for reader in self._readers)

    @property
    def bytes_to_fetch(self) -> int:
        """What the cache still has to hold, where every shard is read."""
        missing = [reader for reader in self._readers if not self._place(reader).is_file()]
        return sum(reader.raw_data.bytes for reader in missing)

    def shard_of(self, id: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect.bisect_right(self._ends, id)

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of the samples, int64 (len(ids), seq_length)."""
        return np.stack([self.sample(int(id))["tokens"] for id in ids]).astype(np.int64)

    def sample(self, id: int) -> dict[str, np.ndarray]:
        """One sample: tokens (seq_length,); of each piece of a document in it lengths, documents and prompt_lengths (pieces,).

        Raises BadShard.
        """
        number = self.shard_of(id)
        return self.open(number).get_item(id - self._ends[number] + self._readers[number].samples)

    def open(self, number: int) -> "_Reader":
        """A shard, fetched, unpacked and checked where it was not open. Raises BadShard."""
        if reader := self._opened(number):
            return reader
        with self._opening[number]:
            if reader := self._opened(number):
                return reader
            if number in self.bad:
                raise BadShard(self.bad[number])
            reader = self._readers[number].on(self._whole(number))
            with self._lock:
                self._open[number] = reader
                if len(self._open) > _MOST_OPEN:
                    del self._open[next(iter(self._open))]
        return reader

    def _opened(self, number: int) -> "_Reader | None":
        with self._lock:
            reader = self._open.pop(number, None)
            if reader:
                self._open[number] = reader  # the last used is the last to go
        return reader

    def _place(self, reader: "_Reader") -> Path:
        """Where the uncompressed shard is read: at its source where it lies there so, else in the cache."""
        local = Path(self.source, reader.raw_data.basename)
        return local if not store.is_remote(self.path) and local.is_file() else self._cache / reader.raw_data.basename

    def _whole(self, number: int) -> BinaryIO:
        """The uncompressed shard's file, its content checked; what is damaged in the cache is fetched again."""
        reader = self._readers[number]
        place = self._place(reader)
        if file := _checked(place, reader):
            return file
        if self._cache not in place.parents:
            raise self._bad(number, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(place.name + ".lock"), "w") as lock:
            with contextlib.suppress(OSError):  # file systems without locks: it is fetched twice, no harm
                fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks of this node fetch it too; a killed one lets go
            for _attempt in range(2):
                if file := _checked(place, reader):
                    return file
                self._fetch(number, place)
            if file := _checked(place, reader):
                return file
        raise self._bad(number, self._origin(reader))

    def _origin(self, reader: "_Reader") -> str:
        return f"{self.source}/{(reader.zip_data or reader.raw_data).basename}"

    def _fetch(self, number: int, place: Path) -> None:
        reader = self._readers[number]
        try:
            content = store.read(self._origin(reader))
        except store.Missing:
            raise self._bad(number, self._origin(reader)) from None
        if reader.zip_data:
            try:
                content = decompress(reader.compression, content)
            except Exception:  # each compression has its own; the check that follows tells
                content = b""
        # A name of this rank's own: locks may not reach other nodes, and some file systems have none.
        temporary = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(place)

    def _bad(self, number: int, file: Path | str) -> BadShard:
        self.bad[number] = (
            f"{file} is missing or damaged: remove it, make it again with the `retemper tokenize` command of {self.path}, and go on; "
            "or leave its samples out with data.bad_shards=skip"
        )
        return BadShard(self.bad[number])


class _Reader(MDSReader):
    """streaming's reader of one shard, on a file that stays open and columns known beforehand.

    streaming's opens the file and parses the columns' types for every sample, which is most of its time (NOTES.md).
    """

    def on(self, file: BinaryIO) -> "_Reader":
        opened = copy.copy(self)
        opened._file = file
        opened._offsets = np.frombuffer(os.pread(file.fileno(), 4 * (self.samples + 1), 4), np.uint32).tolist()
        opened._columns = self.columns()
        return opened

    def columns(self) -> list[tuple[str, np.dtype, int | None]]:
        """(name, type of its values, bytes where they are fixed) of each. Raises ValueError where they are not those of tokens."""
        columns = []
        for name, encoding, size in zip(self.column_names, self.column_encodings, self.column_sizes, strict=True):
            kind = re.fullmatch(r"ndarray:(uint16|uint32):\d+", encoding) if name == "tokens" else None
            if not kind and (name not in _PIECES or encoding != "bytes"):
                raise ValueError(f"it has a column {name} of type {encoding}")
            columns.append((name, np.dtype(kind[1] if kind else _PIECES[name]), size))
        return columns

    def get_sample_data(self, idx: int) -> bytes:
        begin, end = self._offsets[idx : idx + 2]
        data = os.pread(self._file.fileno(), end - begin, begin)
        if len(data) != end - begin:
            raise UserError(f"{self._file.name} was cut off while it was read: start again, and it is fetched anew")
        return data

    def decode_sample(self, data: bytes) -> dict[str, np.ndarray]:
        """MDS holds the sizes of the columns that vary, as uint32, and then all columns."""
        varying = sum(size is None for _, _, size in self._columns)
        sizes, place, sample = iter(np.frombuffer(data, "<u4", varying).tolist()), 4 * varying, {}
        for name, kind, size in self._columns:
            size = next(sizes) if size is None else size
            sample[name] = np.frombuffer(data, kind, size // kind.itemsize, place)
            place += size
        return sample


def _checked(place: Path, reader: _Reader) -> BinaryIO | None:
    """The open file where it has the hash that the index says, else None."""
    try:
        file = open(place, "rb", buffering=0)  # noqa: SIM115 (the reader keeps it)
    except FileNotFoundError:
        return None
    if hashlib.file_digest(file, "sha256").hexdigest() == reader.raw_data.hashes["sha256"]:
        return file
    file.close()
    return None


def _readers(index: bytes, source: str) -> list[_Reader]:
    """A reader of each shard that an index names. Raises UserError where it is not as `retemper tokenize` writes it."""
    try:
        readers = [_Reader.from_json("", "", shard) for shard in json.loads(index)["shards"]]
        for reader in readers:
            reader.columns()
            if reader.samples < 1:
                raise ValueError(f"it has a shard of {reader.samples} samples")
            names = [data.basename for data in (reader.raw_data, reader.zip_data) if data]
            if strange := [name for name in names if not _NAMES.fullmatch(name)]:
                raise ValueError(f"it names the shard {strange[0]!r}")
            if "sha256" not in reader.raw_data.hashes:
                raise ValueError(f"it has no sha256 of {reader.raw_data.basename}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source}/index.json was not written by `retemper tokenize`, do not trust it: {error}") from None
    return readers
