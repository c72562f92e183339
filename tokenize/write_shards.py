"""The write stage of a job: the selected documents are packed and written as MDS shards."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import PIECES
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.pack import Piece, best_fit, concat, one_by_one
from retemper.tokenize.progress import advance
from retemper.tokenize.spool import Bucket, load_bucket


class WriteBucket(PipelineStep):
    """Write the samples of a bucket and then its done-marker; a task's rank selects the bucket.

    The columns are tokens, and those of corpus/format.py.
    """

    name, type = "💾 MDS shards", "💽 - WRITER"

    def __init__(
        self, data: CorpusConfig, work: Path, dtype: str, padding_id: int, token_bytes: np.ndarray
    ):
        """Set up the step.

        Args:
            data: The corpus config.
            work: The job's folder.
            dtype: The type of the token ids.
            padding_id: The id that fills a sample up.
            token_bytes: The number of UTF-8 bytes that each token id represents, (vocab_size,).
        """
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
        with job_folder.record_failure(self.work):
            if job_folder.bucket_done(self.work, plan, split, number, verify=True) is None:
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
        """Write the samples; return their counts, and the near-duplicates written or dropped."""
        from retemper.tokenize.mds_writer import MDSWriter

        bucket = load_bucket(self.work, plan, split, number, self.dtype)
        whole = self.data.keeps_whole
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
        """Count what was written, and what was dropped for which reason.

        Args:
            bucket: The bucket.
            samples: The pieces of each sample that its documents fill.
            written: The samples that were written, the first of these.
            too_long: The documents that are longer than a sample and must stay whole.
            considered: The number of documents, from the first of the bucket, that were packed.
        """
        lengths = bucket.records["length"].astype(np.int64)
        packed = {document for pieces in samples for document, _, _ in pieces}
        written_tokens: Counter[int] = Counter()
        piece_counts: Counter[int] = Counter()
        for document, _, count in (piece for pieces in written for piece in pieces):
            written_tokens[document] += count
            piece_counts[document] += 1
        tokens = written_tokens.total()
        return {
            "samples": len(written),
            "documents": len(written_tokens),
            "bytes": int(bucket.records["bytes"][list(written_tokens)].sum())
            - self._bytes_cut(bucket, written_tokens),
            "tokens": tokens,
            "padding_tokens": len(written) * self.data.seq_length - tokens,
            "cut_documents": sum(
                piece_counts[document] > 1 or written_tokens[document] < int(lengths[document])
                for document in written_tokens
            ),
            "cut_tokens": int(lengths[list(written_tokens)].sum()) - tokens,
            "dropped_duplicate": bucket.duplicates,
            "dropped_near_duplicate": len(bucket.near_duplicates),
            "dropped_longer_than_sample": len(too_long),
            "dropped_tail": considered - len(too_long) - len(packed),
            "dropped_beyond_budget": len(packed) - len(written_tokens) + len(lengths) - considered,
        }

    def _bytes_cut(self, bucket: Bucket, written_tokens: Counter[int]) -> int:
        """Return the UTF-8 bytes of the unwritten tokens of documents that were written in part."""
        lengths = bucket.records["length"]
        tails = [
            bucket.tokens(document, count, int(lengths[document]) - count)
            for document, count in written_tokens.items()
            if count < int(lengths[document])
        ]
        return int(sum(self.token_bytes[ids].sum() for ids in tails))

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
    """Pack the documents of a bucket into samples.

    Args:
        bucket: The bucket.
        data: The corpus config.
        number: The number of the bucket in its split, part of the seed of best_fit.
        documents: The number of documents, in order of priority; None for all.

    Returns:
        The documents that are dropped because they must stay whole and are longer than a sample,
        and the pieces of each sample.
    """
    lengths = bucket.records["length"][:documents].astype(np.int64)
    too_long: set[int] = set()
    if data.keeps_whole and data.source.prompt is not None:
        too_long = {int(document) for document in np.flatnonzero(lengths > data.seq_length)}
        lengths = np.where(lengths > data.seq_length, 0, lengths)
    if data.packing == "best_fit":
        return too_long, best_fit(lengths, data.seq_length, data.seed + number)
    fill = one_by_one if data.keeps_whole else concat
    return too_long, fill(lengths, data.seq_length)
