"""The second half of a job: documents of the spool in order, packed, written as MDS shards."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import PIECES, TRAIN
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.pack import Piece, best_fit, concat
from retemper.tokenize.progress import advance
from retemper.tokenize.spool import Bucket, load_bucket, save_heldout_sketches


class Choose(PipelineStep):
    """Decide how much of each bucket the corpus takes: in order of priority, until data.tokens is reached.

    Of documents that are joined and cut (packing=concat) that is a number of samples, of documents that stay whole
    (packing=best_fit) a number of documents, as many as fill no more than the budget's samples.
    """

    name, type = "⚖ Choose", "🔻 - FILTER"

    def __init__(self, data: CorpusConfig, work: Path, dtype: str):
        super().__init__()
        self.data = data
        self.work = work
        self.dtype = dtype

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        with job_folder.told(self.work):
            plan = job_folder.load_plan(self.work)
            done = job_folder.all_parts_done(self.work, plan)
            _refuse_broken([file for part in done for file in part.get("broken", [])], self.data)
            if plan.near_duplicates != "keep":
                save_heldout_sketches(self.work, plan)
            job_folder.write_limits(self.work, self._limits(plan))
        yield from ()

    def _limits(self, plan: job_folder.Plan) -> list[int | None]:
        """Of each bucket the samples or documents that are taken, None for all."""
        count = plan.buckets[TRAIN]
        if self.data.tokens is None:
            return [None] * count
        wanted = remaining = self.data.tokens // self.data.seq_length
        limits: list[int] = []
        for number in range(count):
            bucket = load_bucket(self.work, plan, TRAIN, number, self.dtype)
            limit, samples, is_all = _within(bucket, self.data, number, remaining)
            limits.append(limit)
            remaining -= samples
            if not is_all or not remaining:
                self._refuse_nothing(limits, bucket, limit)
                return limits + [0] * (count - len(limits))
        raise UserError(
            f"data.tokens={self.data.tokens} is {wanted:,} samples of {self.data.seq_length}, the corpus has {wanted - remaining:,}: "
            "set data.tokens=null to take all (training repeats them by epochs), or give more documents"
        )

    def _refuse_nothing(self, limits: list[int], bucket: Bucket, limit: int) -> None:
        if not any(limits):
            first = int(bucket.records["length"][limit])
            raise UserError(
                f"data.tokens={self.data.tokens} is less than the first document by priority, of {first:,} tokens, which "
                f"data.packing=best_fit takes whole: set data.tokens to at least {-(-first // self.data.seq_length) * self.data.seq_length}"
            )


def _within(bucket: Bucket, data: CorpusConfig, number: int, most: int) -> tuple[int, int, bool]:
    """What of a bucket fills at most so many samples: (samples or documents, the samples they fill, whether that is all of it)."""

    def fill(documents: int | None) -> int:
        return len(pack(bucket, data, number, documents)[1])

    samples = fill(None)
    if data.packing == "concat":
        return min(most, samples), min(most, samples), samples <= most
    documents = len(bucket.records)
    if samples <= most:
        return documents, samples, True
    fits = 0
    exceeds = documents
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if fill(middle) <= most:
            fits = middle
        else:
            exceeds = middle
    return fits, fill(fits), False


class WriteBucket(PipelineStep):
    """Write the samples of the bucket that the task's rank stands for, and then its done-marker.

    Columns: tokens, and those of corpus/format.py.
    """

    name, type = "💾 MDS shards", "💽 - WRITER"

    def __init__(
        self, data: CorpusConfig, work: Path, dtype: str, padding_id: int, token_bytes: np.ndarray
    ):
        """token_bytes: UTF-8 bytes that each token id stands for."""
        super().__init__()
        self.data = data
        self.work = work
        self.dtype = dtype
        self.padding_id = padding_id
        self.token_bytes = token_bytes
        self.columns = {
            "tokens": f"ndarray:{dtype}:{data.seq_length}",
            "lengths": "bytes",
            "documents": "bytes",
        }
        if data.source.prompt is not None:
            self.columns["prompt_lengths"] = "bytes"

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        plan = job_folder.load_plan(self.work)
        split, number = plan.bucket_ids[rank]
        with job_folder.told(self.work):
            if job_folder.bucket_done(self.work, plan, split, number) is None:
                limit = job_folder.read_limit(self.work, split, number)
                folder = job_folder.bucket_folder(self.work, split, number)
                done = self._write(plan, split, number, limit, folder)
                done["fingerprint"] = plan.bucket_fingerprint(split, number, limit)
                job_folder.write_done(
                    job_folder.bucket_marker(self.work, split, number), folder, done
                )
        yield from ()

    def _write(
        self, plan: job_folder.Plan, split: str, number: int, limit: int | None, folder: Path
    ) -> dict:
        """Write the samples; returns their counts, and the near-duplicates in them or left out."""
        from streaming import MDSWriter

        bucket = load_bucket(self.work, plan, split, number, self.dtype)
        whole = self.data.packing == "best_fit"
        too_long, samples = pack(bucket, self.data, number, limit if whole else None)
        written = samples if whole else samples[:limit]
        shutil.rmtree(folder, ignore_errors=True)
        with MDSWriter(
            columns=self.columns,
            out=str(folder),
            compression=self.data.compression,
            hashes=["sha256"],
        ) as writer:
            for pieces in written:
                writer.write(self._sample(bucket, pieces))
                advance(documents=len(pieces), tokens=self.data.seq_length)
        packed = len(bucket.records[:limit]) if whole else len(bucket.records)
        counts = self._counts(bucket, samples, written, too_long, packed)
        in_samples = sorted({document for pieces in written for document, _, _ in pieces})
        pairs = bucket.near_duplicates + bucket.pairs(np.array(in_samples, int))
        return {"counts": counts, "near_duplicates": pairs}

    def _counts(
        self, bucket: Bucket, samples: list, written: list, too_long: set[int], considered: int
    ) -> dict[str, int]:
        """What was written, and what was left out and why. considered: the first documents, that were packed into samples."""
        lengths = bucket.records["length"].astype(np.int64)
        packed = {document for pieces in samples for document, _, _ in pieces}
        held = Counter()
        pieces_of = Counter()
        for document, _, count in (piece for pieces in written for piece in pieces):
            held[document] += count
            pieces_of[document] += 1
        tokens = held.total()
        return {
            "samples": len(written),
            "documents": len(held),
            "bytes": int(bucket.records["bytes"][list(held)].sum())
            - self._bytes_left_out(bucket, held),
            "tokens": tokens,
            "padding_tokens": len(written) * self.data.seq_length - tokens,
            "cut_documents": sum(
                pieces_of[document] > 1 or held[document] < int(lengths[document])
                for document in held
            ),
            "cut_tokens": int(lengths[list(held)].sum()) - tokens,
            "dropped_duplicate": bucket.duplicates,
            "dropped_near_duplicate": len(bucket.near_duplicates),
            "dropped_longer_than_sample": len(too_long),
            "dropped_tail": considered - len(too_long) - len(packed),
            "dropped_beyond_budget": len(packed) - len(held) + len(lengths) - considered,
        }

    def _bytes_left_out(self, bucket: Bucket, held: Counter) -> int:
        """UTF-8 bytes of the tokens that were not written of documents that were written in part: samples end within them."""
        cut = [
            document
            for document, count in held.items()
            if count < int(bucket.records["length"][document])
        ]
        ends = [
            bucket.tokens(
                document, held[document], int(bucket.records["length"][document]) - held[document]
            )
            for document in cut
        ]
        return int(sum(self.token_bytes[ids].sum() for ids in ends))

    def _sample(self, bucket: Bucket, pieces: list[Piece]) -> dict:
        tokens = np.full(self.data.seq_length, self.padding_id, self.dtype)
        position = 0
        for document, start, count in pieces:
            tokens[position : position + count] = bucket.tokens(document, start, count)
            position += count
        sample = {
            "tokens": tokens,
            "lengths": np.array([count for _, _, count in pieces], PIECES["lengths"]).tobytes(),
            "documents": bucket.numbers[[document for document, _, _ in pieces]].tobytes(),
        }
        if "prompt_lengths" in self.columns:
            prompts = bucket.records["prompt"]
            inside = [
                min(max(0, int(prompts[document]) - start), count)
                for document, start, count in pieces
            ]
            sample["prompt_lengths"] = np.array(inside, PIECES["prompt_lengths"]).tobytes()
        return sample


def pack(
    bucket: Bucket, data: CorpusConfig, number: int, documents: int | None = None
) -> tuple[set[int], list[list[Piece]]]:
    """(documents left out because they must stay whole and are too long, the pieces of each sample).

    documents: how many of the bucket, in order of priority, None for all. number: the bucket's.
    """
    lengths = bucket.records["length"][:documents].astype(np.int64)
    too_long: set[int] = set()
    if data.packing == "best_fit" and data.source.prompt is not None:
        too_long = {int(document) for document in np.flatnonzero(lengths > data.seq_length)}
        lengths = np.where(lengths > data.seq_length, 0, lengths)
    samples = (
        best_fit(lengths, data.seq_length, data.seed + number)
        if data.packing == "best_fit"
        else concat(lengths, data.seq_length)
    )
    return too_long, samples


def _refuse_broken(broken: list[dict], data: CorpusConfig) -> None:
    if broken and not data.allow_broken_files:
        files = "\n".join(
            f"  - {file['file']}: {file['error']} (after {file['records_read']:,} records)"
            for file in broken
        )
        raise UserError(
            f"{len(broken)} source files are damaged:\n{files}\nFetch them again and run the same command: only their parts are read again. "
            "Or keep what could be read of them with data.allow_broken_files=true"
        )
