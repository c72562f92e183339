"""Which samples a step holds: a pure function of the seed, the corpus size and the number of samples consumed before."""

import functools

import numpy as np


def sample_ids(seed: int, num_samples: int, consumed_samples: int, count: int) -> np.ndarray:
    """Ids of the next `count` samples after `consumed_samples`, int64 (count,).

    Each epoch is its own permutation of all samples: over an epoch every sample comes exactly once. The number of
    ranks, the batch size and restarts do not enter.
    """
    positions = np.arange(consumed_samples, consumed_samples + count)
    epochs, offsets = np.divmod(positions, num_samples)
    return np.concatenate([_permutation(seed, epoch, num_samples)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(num_samples)
