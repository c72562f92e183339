"""Detection of near-duplicates of held-out documents by MinHash sketches.

A sketch is a one-permutation MinHash of a document's 5-grams of words (Li, Owen, Zhang 2012) whose
empty bins are filled by rotation (Shrivastava and Li 2014): the fraction of bins in which two
sketches are equal estimates the Jaccard similarity of the two sets of 5-grams. Only documents that
have an equal band, four consecutive bins, are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.tokenize.encode import batches
from retemper.tokenize.ngrams import (
    LOWER_WORDS,
    SEGMENT_BYTES,
    SEPARATOR_BYTE,
    gram_hashes,
    normalised,
    segments,
    word_hashes,
)

BINS = 112
# The number that stands for no held-out document.
NONE = np.uint64(2**64 - 1)
_GRAM = 5
_BAND_BINS = 4
_BANDS = BINS // _BAND_BINS
# Documents are near-duplicates if at least this fraction of their bins is equal.
_MIN_SHARE = 0.6
# The maximum number of held-out documents that are compared because of one common band: thousands
# may share a licence text.
_MOST_COMPARED = 16
# The number of documents that are looked up at once.
_BATCH_DOCUMENTS = 1024
# Words that no text contains, inserted between documents: so no 5-gram of a document has words of
# the next one, and a document of fewer than five words still has a 5-gram.
_BETWEEN = b"\0" + b"\1\0" * (_GRAM - 1)
_EMPTY = np.uint64(2**64 - 1)
_MIX = np.uint64(0x9FB21C651E98DF25)
_BAND_MULTIPLIERS = np.cumprod(np.full(_BAND_BINS, 0xD6E8FEB86659FD93, np.uint64))


class Sketch(PipelineStep):
    """Write the bytes of each document's sketch into its metadata.

    The constant text of data.source.prompt is removed first, because all documents share it.
    """

    name, type = "✍ Sketch", "🔻 - FILTER"

    def __init__(self, wording: list[str]):
        """Take the constant parts of data.source.prompt as `wording`."""
        super().__init__()
        self.wording = [part.encode() for part in wording if part.strip()]

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for documents in batches(data):
            texts = [self._without_wording(document.metadata["utf8"]) for document in documents]
            for document, sketch in zip(documents, sketches(texts), strict=True):
                document.metadata["sketch"] = sketch.tobytes()
                yield document

    def _without_wording(self, utf8: bytes) -> bytes:
        for part in self.wording:
            utf8 = utf8.replace(part, SEPARATOR_BYTE, 1)
        return utf8


def sketches(texts: list[bytes]) -> np.ndarray:
    """Return the sketch of each text, uint16 (texts, BINS); zeros for a text without words."""
    no_text = len(texts)  # the owner of the 5-grams that begin between texts
    minima = np.full((len(texts) + 1, BINS), _EMPTY)
    for owners, pieces in _joined(texts):
        starts, _, words = word_hashes(b"".join(pieces))
        grams = gram_hashes(words, _GRAM)
        ends = np.searchsorted(starts, np.cumsum([len(piece) for piece in pieces]))
        counts = np.full((len(pieces), 2), _GRAM - 1)
        counts[:, 0] = np.diff(ends, prepend=0) - counts[:, 1]
        owner = np.repeat([(number, no_text) for number in owners], counts.reshape(-1))
        owner = owner[: len(grams)]
        bins = ((grams >> np.uint64(32)) * np.uint64(BINS)) >> np.uint64(32)
        np.minimum.at(minima.reshape(-1), owner * BINS + bins.astype(np.int64), grams)
    return _fill_empty_bins(minima[:no_text])


def _joined(texts: list[bytes]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yield the pieces of normalised texts, about SEGMENT_BYTES at once.

    Yields the index of each piece's text, and the pieces.
    """
    owners: list[int] = []
    pieces: list[bytes] = []
    size = 0
    for number, text in enumerate(texts):
        for segment in segments(text.translate(LOWER_WORDS), _GRAM):
            piece = segment if segment.isascii() else normalised(segment)
            if pieces and size + len(piece) > SEGMENT_BYTES:
                yield owners, pieces
                owners = []
                pieces = []
                size = 0
            owners.append(number)
            pieces.append(piece + _BETWEEN)
            size += len(pieces[-1])
    if pieces:
        yield owners, pieces


def _fill_empty_bins(minima: np.ndarray) -> np.ndarray:
    """Return sketches, uint16 (texts, BINS), from the least hash in each bin, uint64 (texts, BINS).

    An empty bin gets the hash of the next filled one, changed by the distance to it.
    """
    index = np.arange(BINS)
    filled = minima != _EMPTY
    filled_index = np.where(filled, index, 2 * BINS)
    # The bins are circular: the first one follows the last.
    twice = np.hstack([filled_index, filled_index + BINS])
    next_filled = np.minimum.accumulate(twice[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    distance = (next_filled - index).astype(np.uint64)
    values = np.take_along_axis(minima, next_filled % BINS, axis=1) + distance * _MIX
    bins = ((values * _MIX) >> np.uint64(48)).astype(np.uint16)
    bins[~filled.any(axis=1)] = 0
    return bins


@dataclass(frozen=True)
class HeldoutSketches:
    """An index of the sketches of held-out documents by their bands."""

    documents: np.ndarray  # uint64 (documents,), the document numbers
    bins: np.ndarray  # uint16 (documents, BINS)
    bands: np.ndarray  # uint64 (bands,), hashes in ascending order
    rows: np.ndarray  # int32 (bands,), the index of the document that has each band

    @classmethod
    def of(cls, documents: np.ndarray, bins: np.ndarray) -> "HeldoutSketches":
        """Index documents by the bands of their sketches.

        Args:
            documents: The document numbers, uint64 (documents,).
            bins: Their sketches, uint16 (documents, BINS); documents without words are omitted.
        """
        has_words = bins.any(axis=1)
        documents = documents[has_words]
        bins = bins[has_words]
        bands = _bands(bins).reshape(-1)
        rows = np.repeat(np.arange(len(bins), dtype=np.int32), _BANDS)
        order = np.lexsort((rows, bands))
        return cls(documents, bins, bands[order], rows[order])

    def save(self, folder: Path) -> None:
        """Write the index to a folder, for the tasks of later stages."""
        folder.mkdir(exist_ok=True)
        for name, array in vars(self).items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "HeldoutSketches":
        """Map a saved index into memory, so that the tasks on one machine share it."""
        return cls(
            **{
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in cls.__dataclass_fields__
            }
        )

    def match(self, bins: np.ndarray) -> np.ndarray:
        """Find the most similar held-out near-duplicate of each document.

        Args:
            bins: The sketches of the documents, uint16 (documents, BINS).

        Returns:
            The number of the held-out document, or NONE, for each document, uint64 (documents,).
        """
        starts = range(0, len(bins), _BATCH_DOCUMENTS)
        matches = [self._match(bins[start : start + _BATCH_DOCUMENTS]) for start in starts]
        return np.concatenate([np.zeros(0, np.uint64), *matches])

    def _match(self, bins: np.ndarray) -> np.ndarray:
        bands = _bands(bins)
        first = np.searchsorted(self.bands, bands, "left")
        counts = np.minimum(np.searchsorted(self.bands, bands, "right") - first, _MOST_COMPARED)
        # Every pair of documents that have an equal band, once.
        document = np.repeat(np.arange(len(bins)), counts.sum(axis=1))
        within = np.arange(counts.sum()) - np.repeat(
            np.cumsum(counts) - counts.reshape(-1), counts.reshape(-1)
        )
        row = self.rows[np.repeat(first.reshape(-1), counts.reshape(-1)) + within]
        document, row = np.unique(np.stack([document, row]), axis=1)
        share = (bins[document] == self.bins[row]).mean(axis=1)
        # The assignment keeps the last value: the largest share, and the first row of equal shares.
        order = np.lexsort((-row, share))
        order = order[share[order] >= _MIN_SHARE]
        matches = np.full(len(bins), NONE)
        matches[document[order]] = self.documents[row[order]]
        return matches


def _bands(bins: np.ndarray) -> np.ndarray:
    """Return the hash of each band of sketches, uint64 (documents, bands)."""
    bands = bins.reshape(-1, _BANDS, _BAND_BINS).astype(np.uint64)
    hashes = (bands * _BAND_MULTIPLIERS).sum(axis=2, dtype=np.uint64)
    return (hashes + np.arange(_BANDS, dtype=np.uint64)) * _MIX
