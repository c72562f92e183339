"""Documents to samples, on lengths alone: which tokens of which documents a sample holds."""

import bisect

import numpy as np

Piece = tuple[int, int, int]
"""(document, first token, tokens)"""


def concat(lengths: np.ndarray, seq_length: int) -> list[list[Piece]]:
    """Documents one after another, cut every seq_length tokens; the last tokens that fill no sample are left out.

    lengths: tokens of each document (documents,). Returns the pieces of each sample.
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


def best_fit(lengths: np.ndarray, seq_length: int, seed: int) -> list[list[Piece]]:
    """Documents whole, each in the sample with the least room that it fits; longer ones are cut into full samples and a rest.

    Best-fit decreasing, as "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830) packs; the samples are then
    shuffled by `seed`, or the long documents would come first.
    """
    pieces = [
        (document, start, min(seq_length, int(length) - start))
        for document, length in enumerate(lengths)
        for start in range(0, int(length), seq_length)
    ]
    pieces.sort(key=lambda piece: -piece[2])
    samples: list[list[Piece]] = []
    rooms: list[
        int
    ] = []  # the free room that samples have, ascending, and for each which samples have it
    samples_with: dict[int, list[int]] = {}
    for piece in pieces:
        at = bisect.bisect_left(rooms, piece[2])
        if at < len(rooms):
            room = rooms[at]
            sample = samples_with[room].pop()
            if not samples_with[room]:
                del samples_with[room], rooms[at]
            samples[sample].append(piece)
        else:
            room = seq_length
            sample = len(samples)
            samples.append([piece])
        if room := room - piece[2]:
            if room not in samples_with:
                bisect.insort(rooms, room)
            samples_with.setdefault(room, []).append(sample)
    return [
        samples[index]
        for index in np.random.Generator(np.random.Philox(seed)).permutation(len(samples))
    ]
