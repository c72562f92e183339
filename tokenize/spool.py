"""Between the two halves of a job: token ids of encoded documents, sorted by priority within each piece of a part.

A piece is `<n>.ids`, the ids of its documents one after another, and `<n>.npy`, one record a document.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.tokenize.plan import Plan, load_plan, part_done, part_folder, part_inputs, told, write_done
from retemper.tokenize.progress import advance
from retemper.tokenize.sources import DocumentReader
from retemper.tokenize.split import HELDOUT

RECORD = np.dtype(
    [
        ("heldout", "u1"),
        ("priority", "<u8"),
        ("digest", "<u8", 2),
        ("file", "<u4"),  # number in the part
        ("position", "<u8"),  # byte offset of the line, row number
        ("start", "<u8"),  # of the ids in the piece
        ("length", "<u4"),
        ("prompt", "<u4"),  # leading tokens without loss
        ("bytes", "<u8"),
    ]
)
_PIECE_TOKENS, _PIECE_DOCUMENTS = 1 << 26, 1 << 18


class ReadPart(PipelineStep):
    """The documents of the part that the task's rank stands for."""

    name, type = "📖 Part", "📖 - READER"

    def __init__(self, work: Path, reader: DocumentReader):
        super().__init__()
        self.work, self.reader = work, reader

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from self.reader.read_part(part_inputs(self.work, load_plan(self.work).parts[rank]))


class Spool(PipelineStep):
    """Write a part's documents to its spool, and then its done-marker with what the steps before it counted."""

    name, type = "🧵 Spool", "💽 - WRITER"

    def __init__(self, work: Path, dtype: str, steps: list[PipelineStep]):
        super().__init__()
        self.work, self.dtype, self.steps = work, np.dtype(dtype), steps

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        part = load_plan(self.work).parts[rank]
        with told(self.work):
            if part_done(self.work, part) is None:
                self._write_part(data, part)
        yield from ()

    def _write_part(self, data: DocumentsPipeline, part: str) -> None:
        folder = part_folder(self.work, part)
        for leftover in folder.iterdir():
            if leftover.name != "inputs.json":
                leftover.unlink()
        inputs = part_inputs(self.work, part)
        digests, documents = [hashlib.sha256() for _ in inputs], [0] * len(inputs)
        for number, piece in enumerate(_pieces(data)):
            for document in piece:
                digests[document.metadata["file"]].update(document.metadata["digest"])
                documents[document.metadata["file"]] += 1
            self._write_piece(folder / str(number), piece)
        counts: dict[str, int] = {}
        for step in self.steps:
            for name, metric in step.stats.stats.items():
                if name == "read" or name.startswith("dropped_"):
                    counts[name] = counts.get(name, 0) + int(metric.total)
        reported = {name: items for step in self.steps for name in ("broken", "matches") if (items := getattr(step, name, None))}
        files = [
            {"path": file.path, "start": file.start, "end": file.end, "size": file.size, "documents": count, "sha256": digest.hexdigest()}
            for file, count, digest in zip(inputs, documents, digests, strict=True)
        ]
        write_done(folder / "done.json", folder, {"counts": counts, "sources": files, **reported})

    def _write_piece(self, path: Path, documents: list[Document]) -> None:
        documents.sort(key=_order)
        index = np.zeros(len(documents), RECORD)
        with open(path.with_suffix(".ids"), "wb", buffering=1 << 20) as file:
            start = 0
            for number, document in enumerate(documents):
                ids, about = document.metadata["token_ids"], document.metadata
                file.write(ids.data)
                digest = np.frombuffer(about["digest"], "<u8", 2)
                index[number] = (
                    about["split"] == HELDOUT, about["priority"], digest, about["file"], about["position"],
                    start, len(ids), about["prompt_tokens"], about["bytes"],
                )  # fmt: skip
                start += len(ids)
        np.save(path.with_suffix(".npy"), index)


@dataclass(frozen=True)
class Bucket:
    """The documents of one range of priorities, in order, copies left out, and where their ids lie."""

    records: np.ndarray  # RECORD (documents,)
    part: np.ndarray  # int (documents,), number of the part in the plan
    ids: list[np.ndarray]  # one memory map a piece
    piece: np.ndarray  # int (documents,), index into ids
    duplicates: int

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Ids [start, start + count) of a document."""
        begin = int(self.records["start"][document]) + start
        return self.ids[self.piece[document]][begin : begin + count]


def load_bucket(work: Path, plan: Plan, split: str, number: int, dtype: str) -> Bucket:
    """Gather a bucket from the spools of all parts."""
    count = plan.buckets[split]
    low, high = (-(-(edge << 64) // count) for edge in (number, number + 1))
    records, owners, pieces, ids = [], [], [], []
    for owner, part in enumerate(plan.parts):
        for path in sorted(part_folder(work, part).glob("*.npy"), key=lambda path: int(path.stem)):
            index = np.load(path, mmap_mode="r", allow_pickle=False)
            first_heldout = np.searchsorted(index["heldout"], 1)
            index = index[first_heldout:] if split == HELDOUT else index[:first_heldout]
            priorities = index["priority"]
            begin = np.searchsorted(priorities, np.uint64(low))
            end = len(index) if high >= 1 << 64 else np.searchsorted(priorities, np.uint64(high))
            if begin < end:
                records.append(np.array(index[begin:end]))
                owners.append(np.full(end - begin, owner))
                pieces.append(np.full(end - begin, len(ids)))
                ids.append(np.asarray(np.memmap(path.with_suffix(".ids"), dtype, mode="r")))
    if not records:
        return Bucket(np.zeros(0, RECORD), np.zeros(0, int), [], np.zeros(0, int), 0)
    found, owner, piece = np.concatenate(records), np.concatenate(owners), np.concatenate(pieces)
    order = np.lexsort((found["position"], found["file"], owner, found["digest"][:, 1], found["digest"][:, 0], found["priority"]))
    found, owner, piece = found[order], owner[order], piece[order]
    kept = np.ones(len(found), bool)
    if plan.made_from["clean"]["duplicates"]:
        kept[1:] = (found["digest"][1:] != found["digest"][:-1]).any(axis=1)
    return Bucket(found[kept], owner[kept], ids, piece[kept], int((~kept).sum()))


def _pieces(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    """Documents in lists of so many tokens as memory may hold; at least one list of one document."""
    piece, tokens = [], 0
    for batch in itertools.batched(documents, 64):
        piece += batch
        new = sum(len(document.metadata["token_ids"]) for document in batch)
        tokens += new
        advance(documents=len(batch), tokens=new)
        if tokens >= _PIECE_TOKENS or len(piece) >= _PIECE_DOCUMENTS:
            yield piece
            piece, tokens = [], 0
    if piece:
        yield piece


def _order(document: Document):
    about = document.metadata
    return about["split"] == HELDOUT, about["priority"], about["digest"], about["file"], about["position"]
