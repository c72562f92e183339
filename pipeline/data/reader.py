"""The batches of one rank, read ahead of training."""

import itertools
import shutil
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from retemper.pipeline.data.batch import Batch, make_batches
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.data.order import LANES
from retemper.pipeline.data.shards import BadShard
from retemper.pipeline.data.streams import cache_folder
from retemper.pipeline.distributed.collectives import any_model_parallel_rank
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config

# Steps that are read while one computes, so that the next shards are open before they are needed.
_STEPS_AHEAD = 4
_OPENED_AT_ONCE = 8  # shards of a step that are fetched and hashed in parallel


@dataclass(frozen=True)
class StepData:
    """This rank's part of one global batch: the ids of its samples, and their micro-batches."""

    ids: np.ndarray
    skipped: np.ndarray  # bool: excluded from the loss because the shard is bad
    micro_batches: list[Batch]


class TrainingBatches:
    """An iterator over the steps of one rank, and a context manager that stops the reading."""

    def __init__(self, config: Config, topology: Topology, consumed_samples: int, steps: int):
        """Start reading ahead.

        Args:
            config: the run's config.
            topology: the position of this rank.
            consumed_samples: samples of this data that were consumed before the first step.
            steps: number of steps to read.

        Raises:
            UserError: where a disk is too small for the cache.
        """
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
        # Several readers would wait for each other: 6,000 samples/s instead of 14,000.
        self._reader = ThreadPoolExecutor(1, "step-reader")
        self._openers = ThreadPoolExecutor(_OPENED_AT_ONCE, "shard-opener")
        self._ahead: deque[Future[StepData]] = deque()
        for consumed in itertools.islice(self._steps, _STEPS_AHEAD):
            self._read_ahead(consumed)

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *_error: object) -> None:
        for executor in (self._reader, self._openers):
            executor.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> StepData:
        """Return the data of the next step.

        Raises:
            BadShard: where a shard is bad at its source.
            UserError: where a store cannot be read.
        """
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        data = self._ahead.popleft().result()
        for consumed in itertools.islice(self._steps, 1):
            self._read_ahead(consumed)
        if self.config.data.bad_shards == "skip":
            data = self._sync_skipped(data)
        part = self.topology.context_parallel_rank, self.config.parallel.context_parallel_size
        micro_batches = [
            batch.shard_for_context_parallel(*part).to(self.topology.device)
            for batch in data.micro_batches
        ]
        data = replace(data, micro_batches=micro_batches)
        self.seconds_waited += time.perf_counter() - started
        return data

    def _read_ahead(self, consumed_samples: int) -> None:
        self._ahead.append(self._reader.submit(self._read, consumed_samples))

    def _read(self, consumed_samples: int) -> StepData:
        ids = self.streams.order.batch(consumed_samples, self.config.train.global_batch_size)
        own_ids = np.split(ids, self.topology.data_parallel_size)[self.topology.data_parallel_rank]
        size = self.config.train.micro_batch_size
        mask_documents = self.config.data.mask_documents
        if not self._reads:
            return StepData(
                own_ids,
                np.zeros(len(own_ids), bool),
                [Batch((size, self.config.data.seq_length))] * (len(own_ids) // size),
            )
        samples, skipped = self._samples(own_ids)
        batches = make_batches(samples, size, mask_documents=mask_documents)
        if (streams := len(self.streams.shards)) > 1:
            numbers = torch.from_numpy(self.streams.numbers_of(own_ids)).split(size)
            batches = [
                replace(batch, streams=streams, stream_numbers=part)
                for batch, part in zip(batches, numbers, strict=True)
            ]
        if self.topology.device.type == "cuda":
            # Pinned in this thread, in parallel with training: the first time takes milliseconds.
            batches = [batch.pinned() for batch in batches]
        return StepData(own_ids, skipped, batches)

    def _samples(self, ids: np.ndarray) -> tuple[Samples, np.ndarray]:
        """Return the samples, and bool (n,), which of them are skipped because of a bad shard."""
        located = self.streams.locate(ids)
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
            samples.mask_sample(row)
        return samples, skipped

    def _open(self, shard: tuple[str, int]) -> None:
        """Open a shard, given by stream and number.

        Raises:
            BadShard: where it is bad and may not be skipped.
        """
        name, number = shard
        shards = self.streams.shards[name]
        known = number in shards.bad
        try:
            shards.open(number)
        except BadShard as error:
            if self.config.data.bad_shards == "stop":
                raise BadShard(f"{error}; or skip its samples with data.bad_shards=skip") from None
            if not known:
                print(
                    f"rank {self.topology.rank} skips a shard: {error}", file=sys.stderr, flush=True
                )

    def _sync_skipped(self, data: StepData) -> StepData:
        """Exclude from the loss the samples that any rank of the model could not read.

        Collective: every rank must call this.
        """
        skipped = any_model_parallel_rank(data.skipped)
        if self._reads:
            for number in np.flatnonzero(skipped):
                part, row = divmod(int(number), self.config.train.micro_batch_size)
                mask_BT = data.micro_batches[part].loss_mask_BT
                assert mask_BT is not None, "a rank that reads samples has their masks"
                mask_BT.view(-1, self.config.data.seq_length)[row] = 0
        return replace(data, skipped=skipped)


def _check_disk(config: Config, topology: Topology, streams: Streams) -> None:
    """Check that the cache's disk has space for the shards that this node reads.

    These are the shards in the lanes of its data-parallel ranks.

    Raises:
        UserError: where it has not.
    """
    ranks_with_same_data = (
        config.parallel.tensor_parallel_size * config.parallel.context_parallel_size
    )
    local_data_ranks = -(-topology.local_world_size // ranks_with_same_data)
    # Nodes may share the default cache, which then contains the shards that all of them read.
    part = (
        min(1.0, local_data_ranks / topology.data_parallel_size + 1 / LANES)
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
            f"{folder} has {free >> 20} MiB free, but about {needed >> 20} MiB of shards will be "
            "stored there: "
            "set data.cache_dir to a larger disk of each node"
        )
