"""Which samples a step holds: a pure function of the seed, the streams and the number of samples consumed before.

A sample's id is its place among the samples of all streams, one stream after the other. Ranks, micro-batches, nodes
and restarts do not enter, and neither do versions of libraries: random numbers are raw Philox counters, sorts stable.
"""

import functools
from dataclasses import dataclass

import numpy as np

# Each epoch is read along this many lanes, each a part of the shards. A batch holds as many samples of every lane and
# is sorted by them, so that data-parallel ranks, which take parts of it, each keep to the shards of their lanes
# (streaming calls them canonical nodes). Part of the order: another number is another order.
LANES = 8
# Of the algorithm below: a run goes on only in the order it began with.
ORDER_VERSION = 1


@dataclass(frozen=True)
class Stream:
    """One corpus of a mixture: samples of each shard, and how many samples of every window are its own."""

    seed: int
    shard_sizes: tuple[int, ...]
    per_window: int

    @property
    def samples(self) -> int:
        return sum(self.shard_sizes)


@dataclass(frozen=True)
class Order:
    """Samples in the order of training: window after window, in each the same pattern of streams, spread evenly."""

    streams: tuple[Stream, ...]

    def batch(self, consumed_samples: int, count: int) -> np.ndarray:
        """Ids of the `count` samples after `consumed_samples`, int64 (count,), those of one lane side by side."""
        streams, positions = self._places(np.arange(consumed_samples, consumed_samples + count))
        ids = np.empty(count, np.int64)
        lanes = np.empty(count)
        first = 0
        for number, stream in enumerate(self.streams):
            mine = streams == number
            epochs, offsets = np.divmod(positions[mine], stream.samples)
            orders = self._orders_of(number, np.unique(epochs).tolist())
            ids[mine] = first + np.concatenate(
                [
                    np.empty(0, np.int64),
                    *(order[offsets[epochs == epoch]] for epoch, order in orders.items()),
                ]
            )
            lanes[mine] = (offsets % _lanes(stream.samples)) / _lanes(stream.samples)
            first += stream.samples
        return ids[np.argsort(lanes, kind="stable")]

    def epochs(self, consumed_samples: int) -> list[float]:
        """How often each stream has been read after `consumed_samples`."""
        pattern, _ = self._pattern
        whole, rest = divmod(consumed_samples, len(pattern))
        begun = np.bincount(pattern[:rest], minlength=len(self.streams))
        return [
            (whole * stream.per_window + int(count)) / stream.samples
            for stream, count in zip(self.streams, begun, strict=True)
        ]

    def _orders_of(self, number: int, epochs: list[int]) -> dict[int, np.ndarray]:
        """epoch -> order of a stream; those of its latest batch are kept, which is two where an epoch ends."""
        kept = self._latest.get(number, {})
        stream = self.streams[number]
        self._latest[number] = {
            epoch: kept[epoch] if epoch in kept else _epoch(stream.seed, epoch, stream.shard_sizes)
            for epoch in epochs
        }
        return self._latest[number]

    @functools.cached_property
    def _latest(self) -> dict[int, dict[int, np.ndarray]]:
        return {}

    def _places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample the stream, and the number of that stream's samples before it."""
        pattern, before = self._pattern
        windows, offsets = np.divmod(samples, len(pattern))
        streams = pattern[offsets]
        return streams, windows * np.array([stream.per_window for stream in self.streams])[
            streams
        ] + before[offsets]

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a window the stream, and the number of its samples before in the window."""
        counts = [stream.per_window for stream in self.streams]
        streams = np.repeat(np.arange(len(counts)), counts)
        before = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((2 * before + 1) / (2 * np.array(counts)[streams]), kind="stable")
        return streams[order], before[order]


def _lanes(samples: int) -> int:
    return min(LANES, samples)


def _epoch(seed: int, epoch: int, shard_sizes: tuple[int, ...]) -> np.ndarray:
    """A permutation of all samples, lanes taking turns.

    Shards are dealt to lanes once for all epochs, so that nodes keep theirs; a shard on the edge of two lanes is cut.
    In each epoch a lane takes its shards in a new order, and mixes each with its neighbours: a sample comes at a random
    place within a shard's length of its own shard (streaming's py1e has the idea).
    """
    sizes = np.array(shard_sizes, np.int64)
    starts = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    reach = int(sizes.max())
    dealt = np.argsort(_random(seed, 0).random_raw(len(sizes)), kind="stable")
    ends = np.cumsum(sizes[dealt])
    bits = _random(seed, 1 + int(epoch))
    count = _lanes(total)
    rounds = total // count  # lanes take turns; their lengths differ by one at most
    order = np.empty(total, np.uint32 if total < 2**32 else np.int64)
    last = rounds * count
    for lane in range(count):
        begin, end = (total * edge // count for edge in (lane, lane + 1))
        cuts = np.unique(np.concatenate([[begin, end], ends[(ends > begin) & (ends < end)]]))
        spans = np.argsort(bits.random_raw(len(cuts) - 1), kind="stable")
        shards = np.searchsorted(ends, cuts[:-1], side="right")[spans]
        firsts = starts[dealt[shards]] + cuts[:-1][spans] - (ends[shards] - sizes[dealt[shards]])
        lengths = np.diff(cuts)[spans]
        after = np.cumsum(lengths)
        low = np.maximum(after - lengths - reach, 0)
        high = np.minimum(after + reach, end - begin)
        uniform = (bits.random_raw(end - begin) >> np.uint64(11)) * 2.0**-53
        places = np.repeat(low, lengths) + np.repeat(high - low, lengths) * uniform
        ids = np.repeat(firsts - (after - lengths), lengths) + np.arange(end - begin)
        ids = ids[np.argsort(places, kind="stable")]
        order[lane : rounds * count : count] = ids[:rounds]
        order[last : last + len(ids) - rounds] = ids[rounds:]
        last += len(ids) - rounds
    return order


def _random(seed: int, stage: int) -> np.random.Philox:
    return np.random.Philox(key=[seed, stage])
