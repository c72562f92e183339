"""The spool between the two halves of a job: the token ids of the encoded documents.

A part is spooled in pieces, and the documents of a piece are sorted by priority. A piece consists
of `<n>.ids`, the concatenated ids of its documents, and `<n>.npy`, one record per document; if
training documents are compared with held-out ones, also of `<n>.sketches`, one sketch per document.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import HELDOUT, TRAIN, document_numbers
from retemper.tokenize.job_folder import (
    Plan,
    load_plan,
    part_done,
    part_folder,
    part_inputs,
    record_failure,
    write_done,
)
from retemper.tokenize.progress import advance
from retemper.tokenize.sketch import BINS, NONE, HeldoutSketches
from retemper.tokenize.sources import DocumentReader

RECORD = np.dtype(
    [
        ("heldout", "u1"),
        ("priority", "<u8"),
        ("digest", "<u8", 2),
        ("file", "<u4"),  # index in the part
        ("position", "<u8"),  # byte offset of the line, or row number
        ("start", "<u8"),  # index of the first id in the piece
        ("length", "<u4"),
        ("prompt", "<u4"),  # leading tokens that the loss mask excludes
        ("bytes", "<u8"),
    ]
)
_PIECE_TOKENS = 1 << 26
_PIECE_DOCUMENTS = 1 << 18


class ReadPart(PipelineStep):
    """Read the documents of a part; the rank of a task is the index of its part."""

    name, type = "📖 Part", "📖 - READER"

    def __init__(self, work: Path, reader: DocumentReader):
        super().__init__()
        self.work = work
        self.reader = reader

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        yield from self.reader.read_part(part_inputs(self.work, load_plan(self.work).parts[rank]))


class Spool(PipelineStep):
    """Write a part's documents to its spool, and then its done-marker with the steps' counts."""

    name, type = "🧵 Spool", "💽 - WRITER"

    def __init__(self, work: Path, dtype: str, steps: list[PipelineStep]):
        super().__init__()
        self.work = work
        self.dtype = np.dtype(dtype)
        self.steps = steps

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        part = load_plan(self.work).parts[rank]
        with record_failure(self.work):
            if part_done(self.work, part, verify=True) is None:
                self._write_part(data, part)
        yield from ()

    def _write_part(self, data: DocumentsPipeline, part: str) -> None:
        folder = part_folder(self.work, part)
        for leftover in folder.iterdir():
            if leftover.name != "inputs.json":
                leftover.unlink()
        inputs = part_inputs(self.work, part)
        digests = [hashlib.sha256() for _ in inputs]
        documents = [0] * len(inputs)
        for number, piece in enumerate(_pieces(data)):
            for document in piece:
                digests[document.metadata["file"]].update(document.metadata["digest"])
                documents[document.metadata["file"]] += 1
            self._write_piece(folder / str(number), piece)
        counts: dict[str, int] = {}
        for step in self.steps:
            for name, metric in step.stats.stats.items():
                if name in ("read", "repository_marks") or name.startswith("dropped_"):
                    counts[name] = counts.get(name, 0) + int(metric.total)
        reported = {
            name: items
            for step in self.steps
            for name in ("broken", "matches")
            if (items := getattr(step, name, None))
        }
        files = [
            {
                "path": file.path,
                "start": file.start,
                "end": file.end,
                "size": file.size,
                "documents": count,
                "sha256": digest.hexdigest(),
            }
            for file, count, digest in zip(inputs, documents, digests, strict=True)
        ]
        write_done(folder / "done.json", folder, {"counts": counts, "sources": files, **reported})

    def _write_piece(self, path: Path, documents: list[Document]) -> None:
        documents.sort(key=_order)
        index = np.zeros(len(documents), RECORD)
        with open(path.with_suffix(".ids"), "wb", buffering=1 << 20) as file:
            start = 0
            for number, document in enumerate(documents):
                ids = document.metadata["token_ids"]
                about = document.metadata
                file.write(ids.data)
                digest = np.frombuffer(about["digest"], "<u8", 2)
                index[number] = (
                    about["split"] == HELDOUT, about["priority"], digest,
                    about["file"], about["position"],
                    start, len(ids), about["prompt_tokens"], about["bytes"],
                )  # fmt: skip
                start += len(ids)
        if "sketch" in documents[0].metadata:
            sketches = b"".join(document.metadata["sketch"] for document in documents)
            path.with_suffix(".sketches").write_bytes(sketches)
        np.save(path.with_suffix(".npy"), index)


@dataclass(frozen=True)
class Bucket:
    """The documents of one range of priorities, in order, and the location of their ids."""

    records: np.ndarray  # RECORD (documents,)
    numbers: np.ndarray  # little-endian uint64 (documents,), see split_number
    near: np.ndarray  # uint64 (documents,), number of the similar held-out document, or NONE
    ids: list[np.ndarray]  # one memory map per piece
    piece: np.ndarray  # int (documents,), index into ids
    duplicates: int  # number of documents dropped as copies
    near_duplicates: list[tuple[int, int]]  # (number, held-out number) of those dropped

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return the ids [start, start + count) of a document.

        Args:
            document: The index of the document in the bucket.
            start: The first token.
            count: The number of tokens.
        """
        begin = int(self.records["start"][document]) + start
        return self.ids[self.piece[document]][begin : begin + count]

    def pairs(self, documents: np.ndarray) -> list[tuple[int, int]]:
        """Return the numbers of near-duplicates among some documents, with the held-out numbers.

        Args:
            documents: The indices of the documents in the bucket, int (documents,).

        Returns:
            (number, number of the held-out document) of each near-duplicate.
        """
        similar = documents[self.near[documents] != NONE]
        return list(zip(self.numbers[similar].tolist(), self.near[similar].tolist()))


def load_bucket(work: Path, plan: Plan, split: str, number: int, dtype: str) -> Bucket:
    """Gather a bucket from the spools of all parts.

    Args:
        work: The job's folder.
        plan: Its plan.
        split: The split of the bucket.
        number: The number of the bucket in its split.
        dtype: The type of the token ids.
    """
    count = plan.buckets[split]
    low, high = (-(-(edge << 64) // count) for edge in (number, number + 1))
    heldout = None
    if split == TRAIN and plan.near_duplicates != "keep":
        heldout = HeldoutSketches.load(work / "heldout")
    records = [np.zeros(0, RECORD)]
    numbers = [np.zeros(0, "<u8")]
    near = [np.zeros(0, np.uint64)]
    pieces = [np.zeros(0, int)]
    ids: list[np.ndarray] = []
    for piece_records, piece_numbers, path, first in _records(work, plan, split, low, high):
        size = len(piece_records)
        records.append(piece_records)
        numbers.append(piece_numbers)
        if heldout:
            near.append(heldout.match(_sketches(path, first, size)))
        else:
            near.append(np.full(size, NONE))
        pieces.append(np.full(size, len(ids)))
        ids.append(np.asarray(np.memmap(path.with_suffix(".ids"), dtype, mode="r")))
    gathered = Bucket(
        records=np.concatenate(records),
        numbers=np.concatenate(numbers),
        near=np.concatenate(near),
        ids=ids,
        piece=np.concatenate(pieces),
        duplicates=0,
        near_duplicates=[],
    )
    return _without_duplicates(gathered, plan)


def save_heldout_sketches(work: Path, plan: Plan) -> None:
    """Write the index of the held-out sketches that training documents are compared with."""
    numbers = [np.zeros(0, "<u8")]
    digests = [np.zeros((0, 2), np.uint64)]
    sketches = [np.zeros((0, BINS), np.uint16)]
    for piece_records, piece_numbers, path, first in _records(work, plan, HELDOUT, 0, 1 << 64):
        numbers.append(piece_numbers)
        digests.append(piece_records["digest"])
        sketches.append(_sketches(path, first, len(piece_records)))
    order = np.argsort(np.concatenate(numbers))
    _, first_copies = np.unique(np.concatenate(digests)[order], axis=0, return_index=True)
    unique = order[np.sort(first_copies)]
    index = HeldoutSketches.of(np.concatenate(numbers)[unique], np.concatenate(sketches)[unique])
    index.save(work / "heldout")


def _records(
    work: Path, plan: Plan, split: str, low: int, high: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Path, int]]:
    """Yield the documents of a split whose priority is in [low, high), piece by piece.

    Yields their records, RECORD (documents,), their numbers, little-endian uint64 (documents,), the
    path of the piece, and the index in it of the first of these documents.
    """
    first_file = 0
    for part in plan.parts:
        for path in sorted(part_folder(work, part).glob("*.npy"), key=lambda path: int(path.stem)):
            index = np.load(path, mmap_mode="r", allow_pickle=False)
            first_heldout = int(np.searchsorted(index["heldout"], 1))
            first, last = (first_heldout, len(index)) if split == HELDOUT else (0, first_heldout)
            priorities = index["priority"][first:last]
            begin = first + int(np.searchsorted(priorities, np.uint64(low)))
            end = last
            if high < 1 << 64:
                end = first + int(np.searchsorted(priorities, np.uint64(high)))
            if begin < end:
                records = np.array(index[begin:end])
                files = records["file"].astype("<u8") + np.uint64(first_file)
                yield records, document_numbers(files, records["position"]), path, begin
        first_file += len(part_inputs(work, part))


def _sketches(path: Path, first: int, count: int) -> np.ndarray:
    """Return the sketches [first, first + count) of a piece, uint16 (count, BINS)."""
    sketches = np.memmap(path.with_suffix(".sketches"), np.uint16, mode="r")
    return sketches.reshape(-1, BINS)[first : first + count]


def _without_duplicates(bucket: Bucket, plan: Plan) -> Bucket:
    """Return a bucket in order, without copies and, if they are dropped, near-duplicates."""
    digest = bucket.records["digest"]
    order = np.lexsort((bucket.numbers, digest[:, 1], digest[:, 0], bucket.records["priority"]))
    first = np.ones(len(order), bool)
    if plan.made_from["clean"]["duplicates"]:
        first[1:] = (digest[order][1:] != digest[order][:-1]).any(axis=1)
    unique = order[first]
    dropped = (bucket.near[unique] != NONE) & (plan.near_duplicates == "drop")
    kept = unique[~dropped]
    return replace(
        bucket,
        records=bucket.records[kept],
        numbers=bucket.numbers[kept],
        near=bucket.near[kept],
        piece=bucket.piece[kept],
        duplicates=int((~first).sum()),
        near_duplicates=bucket.pairs(unique[dropped]),
    )


def _pieces(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    """Yield the documents in lists that are limited to what fits into memory."""
    piece: list[Document] = []
    tokens = 0
    for batch in itertools.batched(documents, 64):
        piece += batch
        new = sum(len(document.metadata["token_ids"]) for document in batch)
        tokens += new
        advance(documents=len(batch), tokens=new)
        if tokens >= _PIECE_TOKENS or len(piece) >= _PIECE_DOCUMENTS:
            yield piece
            piece = []
            tokens = 0
    if piece:
        yield piece


def _order(document: Document) -> tuple[bool, int, bytes, int, int]:
    """Return the key by which the documents of a piece are sorted."""
    about = document.metadata
    return (
        about["split"] == HELDOUT,
        about["priority"],
        about["digest"],
        about["file"],
        about["position"],
    )
