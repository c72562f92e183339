"""Access to the samples of a split by id. Every shard is verified by its hash when it is opened."""

import contextlib
import fcntl
import hashlib
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import zstandard

from retemper.pipeline.corpus.manifest import read_manifest, read_verified
from retemper.pipeline.data.mds import Samples, Shard, ShardFile
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.files.json_file import parse_json, with_other_keys

# Open shards per split, each a file descriptor. A rank that reads every lane uses about four shards
# of each.
_MOST_OPEN = 64


@with_other_keys
class _Index(TypedDict):
    shards: list[dict[str, Any]]


class BadShard(UserError):
    """A shard differs from the one that was written, at its source too."""


class TokenShards:
    """One split of a corpus. Several threads may read at once."""

    def __init__(self, path: str | Path, split: str, cache: Path | None = None):
        """Read the index of `path/split`.

        Args:
            path: folder of the corpus, local or remote.
            split: name of the split.
            cache: folder for remote and compressed shards; by default a temporary one, which
                exists as long as this object.

        Raises:
            UserError: where the corpus is missing, its index is not the one that was written, or
                lists another number of samples than the manifest.
        """
        self.path = str(path)
        self.source = f"{path}/{split}"
        self.manifest = read_manifest(self.path)
        if cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="retemper-shards-")
            cache = Path(self._temporary.name)
        self._cache = cache / split
        self._shards = _shards(
            read_verified(self.path, self.manifest, f"{split}/index.json"), self.source
        )
        if len(self) != (expected := self.manifest["splits"][split]["samples"]):
            raise UserError(
                f"{self.source}/index.json lists {len(self):,} samples, {path}/manifest.json "
                f"{expected:,}: do not trust this corpus; tokenize again to another data.path"
            )
        self._ends = np.cumsum([0, *self.shard_sizes])[1:]
        self._open: dict[int, ShardFile] = {}
        self.bad: dict[int, str] = {}  # number of each bad shard -> message; they are not retried
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in self._shards]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def seq_length(self) -> int:
        """The number of tokens per sample."""
        return self.manifest["seq_length"]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """The number of samples of each shard."""
        return tuple(shard.samples for shard in self._shards)

    @property
    def bytes_to_fetch(self) -> int:
        """The size of the shards that are not in the cache yet, if every shard is read."""
        return sum(shard.bytes for shard in self._shards if not self._local_path(shard).is_file())

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of the shard of each sample."""
        return np.searchsorted(self._ends, ids, "right")

    def samples(self, ids: np.ndarray) -> Samples:
        """Return the samples in the order of their ids.

        Raises:
            BadShard: where a shard of theirs is bad.
        """
        samples = Samples(len(ids), self.seq_length)
        self.read(ids, samples, np.arange(len(ids)))
        return samples

    def read(self, ids: np.ndarray, into: Samples, rows: np.ndarray) -> None:
        """Read samples into rows of `into`, shard by shard.

        Args:
            ids: ids of the samples within the split.
            into: the samples to write to.
            rows: the row for each id.

        Raises:
            BadShard: where a shard of theirs is bad.
        """
        numbers = self.shards_of(ids)
        for number in np.unique(numbers).tolist():
            selected = numbers == number
            first = self._ends[number] - self._shards[number].samples
            self.open(number).read((ids[selected] - first).tolist(), into, rows[selected].tolist())

    def open(self, number: int) -> ShardFile:
        """Return an open shard; it is fetched, decompressed and verified if it was not open.

        Raises:
            BadShard: where it is bad.
        """
        if opened := self._opened(number):
            return opened
        with self._opening[number]:
            if opened := self._opened(number):
                return opened
            if number in self.bad:
                raise BadShard(self.bad[number])
            opened = ShardFile(self._shards[number], self._open_verified(number))
            with self._lock:
                self._open[number] = opened
                if len(self._open) > _MOST_OPEN:
                    del self._open[next(iter(self._open))]
        return opened

    def _opened(self, number: int) -> ShardFile | None:
        with self._lock:
            opened = self._open.pop(number, None)
            if opened:
                self._open[number] = opened  # at the end: the least recently used is closed first
        return opened

    def _local_path(self, shard: Shard) -> Path:
        """Return the path of the uncompressed shard: at a local source, or else in the cache."""
        local = Path(self.source, shard.name)
        return (
            local
            if not store.is_remote(self.path) and local.is_file()
            else self._cache / shard.name
        )

    def _open_verified(self, number: int) -> BinaryIO:
        """Open the uncompressed shard and verify its content.

        A damaged shard in the cache is fetched again.
        """
        shard = self._shards[number]
        path = self._local_path(shard)
        if file := _open_if_valid(path, shard):
            return file
        if self._cache not in path.parents:
            raise self._bad(number, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            # Without locks on a file system, a shard is fetched twice, which does no harm. With
            # them, other ranks of this node wait; the lock of a killed rank is released.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            for _attempt in range(2):
                if file := _open_if_valid(path, shard):
                    return file
                self._fetch(number, path)
            if file := _open_if_valid(path, shard):
                return file
        raise self._bad(number, self._source_path(shard))

    def _source_path(self, shard: Shard) -> str:
        return f"{self.source}/{shard.stored_as}"

    def _fetch(self, number: int, path: Path) -> None:
        shard = self._shards[number]
        try:
            content = store.read(self._source_path(shard))
        except store.FileMissing:
            raise self._bad(number, self._source_path(shard)) from None
        if shard.is_compressed:
            try:
                content = zstandard.decompress(content, max_output_size=shard.bytes)
            except zstandard.ZstdError:  # damaged; the hash does not match then
                content = b""
        # The name is unique to this rank: locks may not reach other nodes, and some file systems
        # have none.
        temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)

    def _bad(self, number: int, file: Path | str) -> BadShard:
        self.bad[number] = (
            f"{file} is missing or damaged: remove it, create it again with the "
            f"`retemper tokenize` command of {self.path}, and resume"
        )
        return BadShard(self.bad[number])


def _open_if_valid(path: Path, shard: Shard) -> BinaryIO | None:
    """Return the open file if it has the hash in the index, else None."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (it stays open)
    except FileNotFoundError:
        return None
    if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
        return file
    file.close()
    return None


def _shards(index: bytes, source: str) -> list[Shard]:
    """Parse the shards of an index.

    Raises:
        UserError: where it differs from what `retemper tokenize` writes.
    """
    try:
        return [Shard.from_index(entry) for entry in parse_json(index, _Index)["shards"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}/index.json was not written by `retemper tokenize`, do not trust it: {error}"
        ) from None
