"""Which tokens of a sample count in the loss."""

import numpy as np

from retemper.pipeline.data.mds import Samples


def lengths_and_loss_mask(
    samples: Samples, *, mask_documents: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of all document pieces, and the loss mask of their tokens.

    The pieces of all samples are concatenated; padding is a separate piece. The loss mask is
    float32, 1 for each token with loss, and has one more entry at the end, which is 0.
    """
    lengths = samples.values("lengths").astype(np.int64)
    prompts = samples.values("prompt_lengths").astype(np.int64)
    ends = (
        np.cumsum([len(pieces) for pieces in samples.pieces["lengths"]])
        // samples.values("lengths").itemsize
    )
    padding = samples.seq_length - np.add.reduceat(lengths, np.append(0, ends[:-1]))
    # Padding counts as a prompt.
    lengths, prompts = (np.insert(pieces, ends, padding) for pieces in (lengths, prompts))
    nonempty = lengths > 0
    lengths = lengths[nonempty]
    prompts = prompts[nonempty]
    starts = lengths.cumsum() - lengths
    loss_mask = np.ones(len(samples.tokens), np.float32)
    # The first token of a sample has no context, so it is no target.
    loss_mask[:: samples.seq_length] = 0
    if mask_documents:
        loss_mask[starts] = 0
    loss_mask[ranges(starts, prompts)] = 0
    return lengths, loss_mask


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of ranges, each given by its start and length."""
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)
