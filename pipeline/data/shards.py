"""Samples of a split by id; every shard is checked against its hash when it is opened."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard

from retemper.pipeline.corpus.manifest import read_listed, read_manifest
from retemper.pipeline.data.mds import Samples, Shard, ShardFile
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store

_MOST_OPEN = 64  # shards of one split, each a file descriptor; a rank that reads every lane has about four of each in use


class BadShard(UserError):
    """A shard is not what was written, at its source too."""


class TokenShards:
    """One split of a corpus. Threads may read at once."""

    def __init__(self, path: str | Path, split: str, cache: Path | None = None):
        """Read the index of `path/split`. Remote and compressed shards are kept below `cache`, by default for this object's life.

        Raises UserError where the corpus is missing or its index is not the one that was written.
        """
        self.path = str(path)
        self.source = f"{path}/{split}"
        self.manifest = read_manifest(self.path)
        self._temporary = None if cache else tempfile.TemporaryDirectory(prefix="retemper-shards-")
        self._cache = Path(cache or self._temporary.name, split)
        self._shards = _shards(
            read_listed(self.path, self.manifest, f"{split}/index.json"), self.source
        )
        self._ends = np.cumsum([0, *self.shard_sizes])[1:]
        self._open: dict[int, ShardFile] = {}
        self.bad: dict[int, str] = {}  # found so, and what was said: they are not tried again
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in self._shards]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def seq_length(self) -> int:
        return self.manifest["seq_length"]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self._shards)

    @property
    def bytes_to_fetch(self) -> int:
        """What the cache still has to hold, where every shard is read."""
        return sum(shard.bytes for shard in self._shards if not self._place(shard).is_file())

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample."""
        return np.searchsorted(self._ends, ids, "right")

    def samples(self, ids: np.ndarray) -> Samples:
        """The samples in the order of their ids. Raises BadShard."""
        samples = Samples(len(ids), self.seq_length)
        self.read(ids, samples, np.arange(len(ids)))
        return samples

    def read(self, ids: np.ndarray, into: Samples, rows: np.ndarray) -> None:
        """Samples into those rows, shard by shard. Raises BadShard."""
        numbers = self.shards_of(ids)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            first = self._ends[number] - self._shards[number].samples
            self.open(number).read((ids[here] - first).tolist(), into, rows[here].tolist())

    def open(self, number: int) -> ShardFile:
        """A shard, fetched, unpacked and checked where it was not open. Raises BadShard."""
        if opened := self._opened(number):
            return opened
        with self._opening[number]:
            if opened := self._opened(number):
                return opened
            if number in self.bad:
                raise BadShard(self.bad[number])
            opened = ShardFile(self._shards[number], self._whole(number))
            with self._lock:
                self._open[number] = opened
                if len(self._open) > _MOST_OPEN:
                    del self._open[next(iter(self._open))]
        return opened

    def _opened(self, number: int) -> ShardFile | None:
        with self._lock:
            opened = self._open.pop(number, None)
            if opened:
                self._open[number] = opened  # the last used is the last to go
        return opened

    def _place(self, shard: Shard) -> Path:
        """Where the uncompressed shard is read: at its source where it lies there so, else in the cache."""
        local = Path(self.source, shard.name)
        return (
            local
            if not store.is_remote(self.path) and local.is_file()
            else self._cache / shard.name
        )

    def _whole(self, number: int) -> BinaryIO:
        """The uncompressed shard's file, its content checked; what is damaged in the cache is fetched again."""
        shard = self._shards[number]
        place = self._place(shard)
        if file := _checked(place, shard):
            return file
        if self._cache not in place.parents:
            raise self._bad(number, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(place.name + ".lock"), "w") as lock:
            with contextlib.suppress(
                OSError
            ):  # file systems without locks: it is fetched twice, no harm
                fcntl.flock(
                    lock, fcntl.LOCK_EX
                )  # other ranks of this node fetch it too; a killed one lets go
            for _attempt in range(2):
                if file := _checked(place, shard):
                    return file
                self._fetch(number, place)
            if file := _checked(place, shard):
                return file
        raise self._bad(number, self._origin(shard))

    def _origin(self, shard: Shard) -> str:
        return f"{self.source}/{shard.stored_as}"

    def _fetch(self, number: int, place: Path) -> None:
        shard = self._shards[number]
        try:
            content = store.read(self._origin(shard))
        except store.Missing:
            raise self._bad(number, self._origin(shard)) from None
        if shard.is_compressed:
            try:
                content = zstandard.decompress(content, max_output_size=shard.bytes)
            except zstandard.ZstdError:  # damaged; the check that follows tells
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


def _checked(place: Path, shard: Shard) -> BinaryIO | None:
    """The open file where it has the hash that the index says, else None."""
    try:
        file = open(place, "rb", buffering=0)  # noqa: SIM115 (it stays open)
    except FileNotFoundError:
        return None
    if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
        return file
    file.close()
    return None


def _shards(index: bytes, source: str) -> list[Shard]:
    """The shards of an index. Raises UserError where it is not as `retemper tokenize` writes it."""
    try:
        return [Shard.from_index(entry) for entry in json.loads(index)["shards"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}/index.json was not written by `retemper tokenize`, do not trust it: {error}"
        ) from None
