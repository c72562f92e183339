"""The opened training streams of a run."""

import numpy as np

from retemper.pipeline.config.derive_seed import derive_seed
from retemper.pipeline.corpus.format import TRAIN
from retemper.pipeline.data.order import Order, Stream
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.data.streams import cache_folder, stream_paths
from retemper.pipeline.schema.run import Config


class Streams:
    """The opened training streams of a run, and the order of their samples."""

    def __init__(self, config: Config):
        self.shards = {
            name: TokenShards(path, TRAIN, cache_folder(config, name))
            for name, path in stream_paths(config).items()
        }
        shares = config.data.samples_per_window
        self.order = Order(
            tuple(
                Stream(derive_seed(config.seed, "stream", name), shards.shard_sizes, shares[name])
                for name, shards in self.shards.items()
            )
        )
        self._ends = np.cumsum([len(shards) for shards in self.shards.values()])

    def locate(self, ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Locate ids of the order in the streams.

        Returns:
            stream -> (indices of those ids that belong to it, numbers of their samples within it).
        """
        numbers = self.numbers_of(ids)
        rows = {name: np.flatnonzero(numbers == number) for number, name in enumerate(self.shards)}
        return {
            name: (rows[name], ids[rows[name]] - end + len(self.shards[name]))
            for name, end in zip(rows, self._ends, strict=True)
        }

    def numbers_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each id's stream, in the order of `shards`: int64 (n,)."""
        return np.searchsorted(self._ends, ids, side="right")

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many times each stream has been read after `samples` samples of the order."""
        return dict(zip(self.shards, self.order.epochs(samples), strict=True))
