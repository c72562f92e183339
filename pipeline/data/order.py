"""The samples of each step: a function of seed, streams and the number of samples consumed before.

A sample's id is its index among the samples of all streams, which are concatenated. The order does
not depend on ranks, micro-batches, nodes and restarts, nor on versions of libraries: random numbers
are raw Philox counters, and sorts are stable.
"""

import functools
from dataclasses import dataclass

import numpy as np

# Each epoch is read along this many lanes, each a part of the shards. A batch has the same number
# of samples from every lane and is sorted by lane, so that data-parallel ranks, which take
# consecutive parts of it, each keep to the shards of their lanes (streaming calls them canonical
# nodes). The number is part of the order: changing it changes the order.
LANES = 8
# Version of the algorithm below: a run can only resume in the order with which it began.
ORDER_VERSION = 1


@dataclass(frozen=True)
class Stream:
    """One corpus of a mixture: the samples of each shard, and its number of samples per window."""

    seed: int
    shard_sizes: tuple[int, ...]
    per_window: int

    @property
    def samples(self) -> int:
        """The number of samples of the stream."""
        return sum(self.shard_sizes)


@dataclass(frozen=True)
class Order:
    """The order of samples in training.

    It consists of windows that all have the same, evenly spread pattern of streams.
    """

    streams: tuple[Stream, ...]

    def batch(self, consumed_samples: int, count: int) -> np.ndarray:
        """Return the ids of the next samples, those of one lane next to each other.

        Args:
            consumed_samples: samples consumed before.
            count: number of ids to return.

        Returns:
            int64 (count,).
        """
        streams, positions = self._locate(np.arange(consumed_samples, consumed_samples + count))
        ids = np.empty(count, np.int64)
        lanes = np.empty(count)
        first = 0
        for number, stream in enumerate(self.streams):
            selected = streams == number
            epochs, offsets = np.divmod(positions[selected], stream.samples)
            orders = self._epoch_orders(number, np.unique(epochs).tolist())
            ids[selected] = first + np.concatenate(
                [
                    np.empty(0, np.int64),
                    *(order[offsets[epochs == epoch]] for epoch, order in orders.items()),
                ]
            )
            lanes[selected] = (offsets % _lanes(stream.samples)) / _lanes(stream.samples)
            first += stream.samples
        return ids[np.argsort(lanes, kind="stable")]

    def epochs(self, consumed_samples: int) -> list[float]:
        """Return how many times each stream has been read after `consumed_samples`."""
        pattern, _ = self._pattern
        whole, rest = divmod(consumed_samples, len(pattern))
        started = np.bincount(pattern[:rest], minlength=len(self.streams))
        return [
            (whole * stream.per_window + int(count)) / stream.samples
            for stream, count in zip(self.streams, started, strict=True)
        ]

    def _epoch_orders(self, number: int, epochs: list[int]) -> dict[int, np.ndarray]:
        """Return epoch -> order of a stream for the epochs of a batch.

        The orders of the latest batch are cached; that is two where an epoch ends.
        """
        cached = self._latest.get(number, {})
        stream = self.streams[number]
        self._latest[number] = {
            epoch: cached[epoch]
            if epoch in cached
            else _epoch(stream.seed, epoch, stream.shard_sizes)
            for epoch in epochs
        }
        return self._latest[number]

    @functools.cached_property
    def _latest(self) -> dict[int, dict[int, np.ndarray]]:
        return {}

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stream of each sample, and the number of that stream's samples before it."""
        pattern, before = self._pattern
        windows, offsets = np.divmod(samples, len(pattern))
        streams = pattern[offsets]
        return streams, windows * np.array([stream.per_window for stream in self.streams])[
            streams
        ] + before[offsets]

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """The stream at each index of a window, and the number of its samples before that index."""
        counts = [stream.per_window for stream in self.streams]
        streams = np.repeat(np.arange(len(counts)), counts)
        before = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((2 * before + 1) / (2 * np.array(counts)[streams]), kind="stable")
        return streams[order], before[order]


def _lanes(samples: int) -> int:
    return min(LANES, samples)


def _epoch(seed: int, epoch: int, shard_sizes: tuple[int, ...]) -> np.ndarray:
    """Return a permutation of all samples that alternates between lanes.

    Shards are assigned to lanes once for all epochs, so that nodes keep theirs; a shard on the edge
    of two lanes is divided. In each epoch a lane reads its shards in a new order and mixes each
    with its neighbours: a sample moves to a random position within a shard's length of its own
    shard (the idea is that of streaming's py1e).
    """
    sizes = np.array(shard_sizes, np.int64)
    starts = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    reach = int(sizes.max())
    shuffled = np.argsort(_random(seed, 0).random_raw(len(sizes)), kind="stable")
    ends = np.cumsum(sizes[shuffled])
    bits = _random(seed, 1 + int(epoch))
    count = _lanes(total)
    rounds = total // count  # the lengths of lanes differ by one at most
    order = np.empty(total, np.uint32 if total < 2**32 else np.int64)
    last = rounds * count
    for lane in range(count):
        begin, end = (total * edge // count for edge in (lane, lane + 1))
        cuts = np.unique(np.concatenate([[begin, end], ends[(ends > begin) & (ends < end)]]))
        spans = np.argsort(bits.random_raw(len(cuts) - 1), kind="stable")
        shards = np.searchsorted(ends, cuts[:-1], side="right")[spans]
        firsts = (
            starts[shuffled[shards]] + cuts[:-1][spans] - (ends[shards] - sizes[shuffled[shards]])
        )
        lengths = np.diff(cuts)[spans]
        after = np.cumsum(lengths)
        low = np.maximum(after - lengths - reach, 0)
        high = np.minimum(after + reach, end - begin)
        uniform = (bits.random_raw(end - begin) >> np.uint64(11)) * 2.0**-53
        positions = np.repeat(low, lengths) + np.repeat(high - low, lengths) * uniform
        ids = np.repeat(firsts - (after - lengths), lengths) + np.arange(end - begin)
        ids = ids[np.argsort(positions, kind="stable")]
        order[lane : rounds * count : count] = ids[:rounds]
        order[last : last + len(ids) - rounds] = ids[rounds:]
        last += len(ids) - rounds
    return order


def _random(seed: int, stage: int) -> np.random.Philox:
    return np.random.Philox(key=[seed, stage])
