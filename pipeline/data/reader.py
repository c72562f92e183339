"""The batches of one rank, read ahead of training."""

import itertools
import shutil
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from retemper.pipeline.corpus.format import TRAIN
from retemper.pipeline.data.batch import Batch, make_batches
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.order import LANES, Order, Stream
from retemper.pipeline.data.shards import BadShard, TokenShards
from retemper.pipeline.data.streams import cache_folder, samples_per_window, stream_paths
from retemper.pipeline.distributed.collectives import anywhere_in_model
from retemper.pipeline.distributed.seeds import derive_seed
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config

_STEPS_AHEAD = (
    4  # read while a step computes, so that the next shards are there before they are needed
)
_OPENED_AT_ONCE = 8  # shards of a step that are fetched and hashed together


class Streams:
    """The training streams of a run, opened, and the order in which their samples come."""

    def __init__(self, config: Config):
        self.shards = {
            name: TokenShards(path, TRAIN, cache_folder(config, name))
            for name, path in stream_paths(config).items()
        }
        shares = samples_per_window(config)
        self.order = Order(
            tuple(
                Stream(derive_seed(config.seed, "stream", name), shards.shard_sizes, shares[name])
                for name, shards in self.shards.items()
            )
        )
        self._ends = np.cumsum([len(shards) for shards in self.shards.values()])

    def located(self, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """stream -> which of the ids of the order stand for its samples, and which samples those are."""
        numbers = np.searchsorted(self._ends, ids, side="right")
        rows = {name: np.flatnonzero(numbers == number) for number, name in enumerate(self.shards)}
        return {
            name: (rows[name], ids[rows[name]] - end + len(self.shards[name]))
            for name, end in zip(rows, self._ends, strict=True)
        }

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each stream has been read after `samples` of the order."""
        return dict(zip(self.shards, self.order.epochs(samples), strict=True))


@dataclass(frozen=True)
class StepData:
    """This rank's part of one global batch: ids of its samples, and the micro-batches that hold them in that order."""

    ids: np.ndarray
    skipped: np.ndarray  # bool, which of them are left out of the loss because their shard is bad
    micro_batches: list[Batch]


class TrainingBatches:
    """Iterates over the steps of one rank from a number of consumed samples on; a context manager, which ends the reading."""

    def __init__(self, config: Config, topology: Topology, consumed_samples: int, steps: int):
        """The `steps` steps of this data that follow `consumed_samples` of its samples. Raises UserError where a disk is too small."""
        self.config = config
        self.topology = topology
        batch_size = config.train.global_batch_size
        self._steps = iter(
            range(consumed_samples, consumed_samples + steps * batch_size, batch_size)
        )
        self.seconds_waited = 0.0
        self._reads = (
            config.data.mask_documents or topology.is_first_stage or topology.is_last_stage
        )
        self.streams = Streams(config)
        _check_disk(config, topology, self.streams)
        self._reader = ThreadPoolExecutor(
            1, "step-reader"
        )  # more of them wait for each other: 6,000 samples/s against 14,000
        self._openers = ThreadPoolExecutor(_OPENED_AT_ONCE, "shard-opener")
        self._ahead: deque[Future[StepData]] = deque()
        for consumed in itertools.islice(self._steps, _STEPS_AHEAD):
            self._read_ahead(consumed)

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *_error) -> None:
        for executor in (self._reader, self._openers):
            executor.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> StepData:
        """The next step's data. Raises BadShard where a shard is bad at its source, UserError where a store gives none."""
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        data = self._ahead.popleft().result()
        for consumed in itertools.islice(self._steps, 1):
            self._read_ahead(consumed)
        if self.config.data.bad_shards == "skip":
            data = self._agree(data)
        part = self.topology.context_parallel_rank, self.config.parallel.context_parallel_size
        micro_batches = [
            batch.of_context_rank(*part).to(self.topology.device) for batch in data.micro_batches
        ]
        data = replace(data, micro_batches=micro_batches)
        self.seconds_waited += time.perf_counter() - started
        return data

    def _read_ahead(self, consumed_samples: int) -> None:
        self._ahead.append(self._reader.submit(self._read, consumed_samples))

    def _read(self, consumed_samples: int) -> StepData:
        ids = self.streams.order.batch(consumed_samples, self.config.train.global_batch_size)
        mine = np.split(ids, self.topology.data_parallel_size)[self.topology.data_parallel_rank]
        size = self.config.train.micro_batch_size
        mask_documents = self.config.data.mask_documents
        if not self._reads:
            return StepData(
                mine,
                np.zeros(len(mine), bool),
                [Batch((size, self.config.data.seq_length))] * (len(mine) // size),
            )
        samples, skipped = self._samples(mine)
        batches = make_batches(samples, size, mask_documents=mask_documents)
        if self.topology.device.type == "cuda":
            batches = [
                batch.pinned() for batch in batches
            ]  # here, beside training: the first time takes milliseconds
        return StepData(mine, skipped, batches)

    def _samples(self, ids: np.ndarray) -> tuple[Samples, np.ndarray]:
        """The samples, and which of them are left out because their shard is bad, bool (n,)."""
        located = self.streams.located(ids)
        wanted = {
            (name, number)
            for name, (_, numbers) in located.items()
            for number in self.streams.shards[name].shards_of(numbers).tolist()
        }
        list(self._openers.map(self._open, sorted(wanted)))
        samples = Samples(len(ids), self.config.data.seq_length)
        skipped = np.zeros(len(ids), bool)
        for name, (rows, numbers) in located.items():
            shards = self.streams.shards[name]
            bad = np.isin(shards.shards_of(numbers), list(shards.bad))
            skipped[rows[bad]] = True
            shards.read(numbers[~bad], samples, rows[~bad])
        for row in np.flatnonzero(skipped).tolist():
            samples.leave_out(row)
        return samples, skipped

    def _open(self, place: tuple[str, int]) -> None:
        """Open a shard of a stream. Raises BadShard where it is bad and may not be skipped."""
        name, number = place
        shards = self.streams.shards[name]
        known = number in shards.bad
        try:
            shards.open(number)
        except BadShard as error:
            if self.config.data.bad_shards == "stop":
                raise
            if not known:
                print(
                    f"rank {self.topology.rank} skips a shard: {error}", file=sys.stderr, flush=True
                )

    def _agree(self, data: StepData) -> StepData:
        """Leave out of the loss what any rank of the model could not read."""
        skipped = anywhere_in_model(data.skipped)
        if self._reads:
            for number in np.flatnonzero(skipped):
                part, row = divmod(int(number), self.config.train.micro_batch_size)
                data.micro_batches[part].loss_mask_BT.view(-1, self.config.data.seq_length)[row] = 0
        return replace(data, skipped=skipped)


def _check_disk(config: Config, topology: Topology, streams: Streams) -> None:
    """Refuse a cache that cannot hold what this node reads: the shards of its data-parallel ranks' lanes."""
    readers_alike = config.parallel.tensor_parallel_size * config.parallel.context_parallel_size
    ranks_here = -(-topology.local_world_size // readers_alike)
    # The default cache is one that nodes may share, and holds what all of them read.
    part = (
        min(1.0, ranks_here / topology.data_parallel_size + 1 / LANES)
        if config.data.cache_dir
        else 1.0
    )
    needed = int(part * sum(shards.bytes_to_fetch for shards in streams.shards.values()))
    if not needed:
        return
    folder = cache_folder(config, config.data.name).parent
    folder.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder} has {free >> 20} MiB free, but about {needed >> 20} MiB of shards will be kept there: "
            "set data.cache_dir to a larger disk of each node"
        )
