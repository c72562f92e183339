"""Packing of documents into samples: which tokens of which documents are in each sample.

Only the lengths of the documents are needed.
"""

import bisect

import numpy as np

Piece = tuple[int, int, int]
"""(document, first token, tokens)"""


def concat(lengths: np.ndarray, seq_length: int) -> list[list[Piece]]:
    """Concatenate the documents and cut them every seq_length tokens.

    The last tokens, which do not fill a sample, are dropped.

    Args:
        lengths: The number of tokens of each document, (documents,).
        seq_length: The number of tokens of a sample.

    Returns:
        The pieces of each sample.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    samples = []
    for begin in range(0, int(ends[-1]) // seq_length * seq_length if len(ends) else 0, seq_length):
        first = np.searchsorted(ends, begin, "right")
        last = np.searchsorted(ends, begin + seq_length, "left")
        pieces = []
        for document in range(first, last + 1):
            piece_start = max(begin, starts[document])
            piece_end = min(begin + seq_length, ends[document])
            if piece_end > piece_start:
                pieces.append(
                    (document, int(piece_start - starts[document]), int(piece_end - piece_start))
                )
        samples.append(pieces)
    return samples


def one_by_one(lengths: np.ndarray, seq_length: int) -> list[list[Piece]]:
    """Put each document into a sample of its own, or cut it into several where it is longer.

    Args:
        lengths: The number of tokens of each document, (documents,).
        seq_length: The number of tokens of a sample.

    Returns:
        The piece of each sample, in the order of the documents.
    """
    return [
        [(document, start, min(seq_length, int(length) - start))]
        for document, length in enumerate(lengths)
        for start in range(0, int(length), seq_length)
    ]


def best_fit(lengths: np.ndarray, seq_length: int, seed: int) -> list[list[Piece]]:
    """Put each document whole into the sample with the least free space that it fits into.

    Documents that are longer than a sample are cut into full samples and a remainder. This is
    best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).

    Args:
        lengths: The number of tokens of each document, (documents,).
        seq_length: The number of tokens of a sample.
        seed: The seed by which the samples are shuffled; otherwise the long documents would come
            first.

    Returns:
        The pieces of each sample.
    """
    pieces = [piece for [piece] in one_by_one(lengths, seq_length)]
    pieces.sort(key=lambda piece: -piece[2])
    samples: list[list[Piece]] = []
    # The distinct amounts of free space, ascending, and the samples that have each amount.
    free_sizes: list[int] = []
    samples_with: dict[int, list[int]] = {}
    for piece in pieces:
        index = bisect.bisect_left(free_sizes, piece[2])
        if index < len(free_sizes):
            free = free_sizes[index]
            sample = samples_with[free].pop()
            if not samples_with[free]:
                del samples_with[free], free_sizes[index]
            samples[sample].append(piece)
        else:
            free = seq_length
            sample = len(samples)
            samples.append([piece])
        if free := free - piece[2]:
            if free not in samples_with:
                bisect.insort(free_sizes, free)
            samples_with.setdefault(free, []).append(sample)
    return [
        samples[index]
        for index in np.random.Generator(np.random.Philox(seed)).permutation(len(samples))
    ]
