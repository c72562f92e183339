"""The select stage of a job: which of the spooled documents are in the corpus."""

from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import TRAIN
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.spool import Bucket, load_bucket, save_heldout_sketches
from retemper.tokenize.write_shards import pack


class Select(PipelineStep):
    """Decide how much of each bucket is in the corpus: in order of priority, up to data.tokens.

    With packing=concat, which joins and cuts documents, the limit of a bucket is a number of
    samples. With best_fit and none, which keep them whole, it is the largest number of documents
    that fit into the samples of the budget.
    """

    name, type = "⚖ Select", "🔻 - FILTER"

    def __init__(self, data: CorpusConfig, work: Path, dtype: str):
        super().__init__()
        self.data = data
        self.work = work
        self.dtype = dtype

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        with job_folder.record_failure(self.work):
            plan = job_folder.load_plan(self.work)
            done = job_folder.all_parts_done(self.work, plan)
            _refuse_broken([file for part in done for file in part.get("broken", [])], self.data)
            if plan.near_duplicates != "keep":
                save_heldout_sketches(self.work, plan)
            job_folder.write_limits(self.work, self._limits(plan))
        yield from ()

    def _limits(self, plan: job_folder.Plan) -> list[int | None]:
        """Return the limit of each training bucket in samples or documents, None for all."""
        count = plan.buckets[TRAIN]
        if self.data.tokens is None:
            return [None] * count
        budget = remaining = self.data.tokens // self.data.seq_length
        limits: list[int] = []
        for number in range(count):
            bucket = load_bucket(self.work, plan, TRAIN, number, self.dtype)
            limit, samples, is_all = _within(bucket, self.data, number, remaining)
            limits.append(limit)
            remaining -= samples
            if not is_all or not remaining:
                self._refuse_nothing(limits, bucket, limit)
                return [*limits, *[0] * (count - len(limits))]
        raise UserError(
            f"data.tokens={self.data.tokens} is {budget:,} samples of {self.data.seq_length}, "
            f"the corpus has {budget - remaining:,}: set data.tokens=null to take all "
            "(training repeats them in epochs), or provide more documents"
        )

    def _refuse_nothing(self, limits: list[int], bucket: Bucket, limit: int) -> None:
        if not any(limits):
            first = int(bucket.records["length"][limit])
            minimum = -(-first // self.data.seq_length) * self.data.seq_length
            raise UserError(
                f"data.tokens={self.data.tokens} is less than the first document by priority, of "
                f"{first:,} tokens, which data.packing={self.data.packing} takes whole: "
                f"set data.tokens={minimum} or more"
            )


def _within(bucket: Bucket, data: CorpusConfig, number: int, most: int) -> tuple[int, int, bool]:
    """Find how much of a bucket fits into `most` samples.

    Returns:
        The limit in samples (packing=concat) or in documents, the number of samples that it fills,
        and whether it is the whole bucket.
    """

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


def _refuse_broken(broken: list[dict], data: CorpusConfig) -> None:
    if broken and not data.allow_broken_files:
        files = "\n".join(
            f"  - {file['file']}: {file['error']} (after {file['records_read']:,} records)"
            for file in broken
        )
        raise UserError(
            f"{len(broken)} source files are damaged:\n{files}\n"
            "Correct them or fetch them again, and run the same command: only their parts are read "
            "again. Or keep what could be read of them with data.allow_broken_files=true"
        )
