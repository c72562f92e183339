"""Which documents are near-duplicates of held-out ones, by sketches of the words they hold.

A sketch is a one-permutation MinHash of a document's runs of five words (Li, Owen, Zhang 2012), its
empty bins filled by rotation (Shrivastava and Li 2014): the share of bins in which two sketches are
equal estimates the Jaccard similarity of the two sets of runs. Only documents with an equal band,
four bins in a row, are compared at all.
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
# No held-out document; the number of none.
NONE = np.uint64(2**64 - 1)
_GRAM = 5
_BAND_BINS = 4
_BANDS = BINS // _BAND_BINS
# Documents are near-duplicates when so many of their bins are equal.
_MIN_SHARE = 0.6
# Held-out documents with one band in common that are compared: thousands may share a licence text.
_MOST_COMPARED = 16
# Documents that are looked up at once.
_BATCH_DOCUMENTS = 1024
# Words that no text holds, between documents: no run of words of one reaches into the next, and a
# document of fewer words than a run still has one.
_BETWEEN = b"\0" + b"\1\0" * (_GRAM - 1)
_EMPTY = np.uint64(2**64 - 1)
_MIX = np.uint64(0x9FB21C651E98DF25)
_BAND_MULTIPLIERS = np.cumprod(np.full(_BAND_BINS, 0xD6E8FEB86659FD93, np.uint64))


class Sketch(PipelineStep):
    """Write the bytes of each document's sketch into its metadata.

    The wording that data.source.prompt puts around columns is left out: all documents share it.
    """

    name, type = "✍ Sketch", "🔻 - FILTER"

    def __init__(self, wording: list[str]):
        """wording: the constant parts of data.source.prompt."""
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
    """The sketch of each text, uint16 (texts, BINS); zeros for a text without a word."""
    nobody = len(texts)  # whose are the runs of words that begin between texts
    least = np.full((len(texts) + 1, BINS), _EMPTY)
    for owners, pieces in _joined(texts):
        starts, _, words = word_hashes(b"".join(pieces))
        grams = gram_hashes(words, _GRAM)
        ends = np.searchsorted(starts, np.cumsum([len(piece) for piece in pieces]))
        counts = np.full((len(pieces), 2), _GRAM - 1)
        counts[:, 0] = np.diff(ends, prepend=0) - counts[:, 1]
        owner = np.repeat([(number, nobody) for number in owners], counts.reshape(-1))[: len(grams)]
        bins = ((grams >> np.uint64(32)) * np.uint64(BINS)) >> np.uint64(32)
        np.minimum.at(least.reshape(-1), owner * BINS + bins.astype(np.int64), grams)
    return _filled(least[:nobody])


def _joined(texts: list[bytes]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Pieces of normalised texts, about SEGMENT_BYTES at once: (the text of each, the pieces)."""
    owners = []
    pieces = []
    size = 0
    for number, text in enumerate(texts):
        for piece in map(normalised, segments(text.translate(LOWER_WORDS), _GRAM)):
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


def _filled(least: np.ndarray) -> np.ndarray:
    """Sketches of the least hash in each bin, uint64 (texts, BINS).

    An empty bin takes the next one's hash, changed by how far away that is.
    """
    place = np.arange(BINS)
    filled = least != _EMPTY
    at = np.where(filled, place, 2 * BINS)
    # The bins go round: the one after the last is the first.
    next_filled = np.minimum.accumulate(np.hstack([at, at + BINS])[:, ::-1], axis=1)[:, ::-1][
        :, :BINS
    ]
    distance = (next_filled - place).astype(np.uint64)
    values = np.take_along_axis(least, next_filled % BINS, axis=1) + distance * _MIX
    found = ((values * _MIX) >> np.uint64(48)).astype(np.uint16)
    found[~filled.any(axis=1)] = 0
    return found


@dataclass(frozen=True)
class HeldoutSketches:
    """The sketches of held-out documents, found by their bands."""

    documents: np.ndarray  # uint64 (documents,), their numbers
    bins: np.ndarray  # uint16 (documents, BINS)
    bands: np.ndarray  # uint64 (bands,), hashes in ascending order
    rows: np.ndarray  # int32 (bands,), the document that each band is of

    @classmethod
    def of(cls, documents: np.ndarray, bins: np.ndarray) -> "HeldoutSketches":
        """Index documents by the bands of their sketches."""
        has_words = bins.any(axis=1)
        documents = documents[has_words]
        bins = bins[has_words]
        bands = _bands(bins).reshape(-1)
        rows = np.repeat(np.arange(len(bins), dtype=np.int32), _BANDS)
        order = np.lexsort((rows, bands))
        return cls(documents, bins, bands[order], rows[order])

    def save(self, folder: Path) -> None:
        """Write the index where the tasks of later stages find it."""
        folder.mkdir(exist_ok=True)
        for name, array in vars(self).items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "HeldoutSketches":
        """Map a saved index into memory, which tasks on one machine then share."""
        return cls(
            **{
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in cls.__dataclass_fields__
            }
        )

    def match(self, bins: np.ndarray) -> np.ndarray:
        """The number of the held-out document most like each of some sketches, or NONE.

        bins: the sketches, uint16 (documents, BINS). Returns uint64 (documents,).
        """
        starts = range(0, len(bins), _BATCH_DOCUMENTS)
        found = [self._match(bins[start : start + _BATCH_DOCUMENTS]) for start in starts]
        return np.concatenate([np.zeros(0, np.uint64), *found])

    def _match(self, bins: np.ndarray) -> np.ndarray:
        wanted = _bands(bins)
        first = np.searchsorted(self.bands, wanted, "left")
        counts = np.minimum(np.searchsorted(self.bands, wanted, "right") - first, _MOST_COMPARED)
        # Every pair of documents with an equal band, once.
        document = np.repeat(np.arange(len(bins)), counts.sum(axis=1))
        within = np.arange(counts.sum()) - np.repeat(
            np.cumsum(counts) - counts.reshape(-1), counts.reshape(-1)
        )
        row = self.rows[np.repeat(first.reshape(-1), counts.reshape(-1)) + within]
        document, row = np.unique(np.stack([document, row]), axis=1)
        share = (bins[document] == self.bins[row]).mean(axis=1)
        # The last one written is that of the largest share, and of those the first row.
        order = np.lexsort((-row, share))
        order = order[share[order] >= _MIN_SHARE]
        found = np.full(len(bins), NONE)
        found[document[order]] = self.documents[row[order]]
        return found


def _bands(bins: np.ndarray) -> np.ndarray:
    """A hash of each band of sketches, uint64 (documents, bands)."""
    bands = bins.reshape(-1, _BANDS, _BAND_BINS).astype(np.uint64)
    hashes = (bands * _BAND_MULTIPLIERS).sum(axis=2, dtype=np.uint64)
    return (hashes + np.arange(_BANDS, dtype=np.uint64)) * _MIX
