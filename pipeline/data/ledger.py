"""The record of the samples that every step read, one file per rank, and its verification.

The verification proves that no sample was skipped or repeated.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.data.reader import StepData
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import with_other_keys
from retemper.pipeline.files.jsonl import append_line, read_lines
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config

_SHOWN_PROBLEMS = 10


@with_other_keys
class _Samples(run_folder.OfStep):
    """A record of samples."""

    ids: list[Annotated[int, Field(ge=0, lt=1 << 63)]]


@with_other_keys
class _Read(_Samples):
    """A record of the samples that a rank read."""

    data_parallel_rank: int
    data_parallel_size: int


class Ledger:
    """Records the samples of each step of this rank.

    With data.ledger all samples are recorded. Those skipped because of a bad shard always are.
    """

    def __init__(self, config: Config, topology: Topology):
        self.config = config
        self.topology = topology
        self._first_of_model = (
            topology.is_first_stage
            and topology.tensor_parallel_rank == topology.context_parallel_rank == 0
        )
        self._reads = topology.is_first_stage or topology.is_last_stage

    def record(self, step: int, data: StepData) -> None:
        """Record the samples of the step numbered `step`, counted from 1."""
        folder = self.config.run_dir
        topology = self.topology
        file = f"rank-{self.topology.rank:05d}.jsonl"
        if self.config.data.ledger and self._reads:
            peers = {
                "data_parallel_rank": topology.data_parallel_rank,
                "data_parallel_size": topology.data_parallel_size,
            }
            line = {"step": step, **peers, "ids": data.ids.tolist()}
            append_line(folder / run_folder.LEDGER / file, line)
        if self._first_of_model and data.skipped.any():
            append_line(
                folder / run_folder.SKIPPED / file,
                {"step": step, "ids": data.ids[data.skipped].tolist()},
            )


def verify(config: Config, began_at: int) -> str:
    """Verify a run's ledger, for every step from 1 on.

    The ranks of one model must have read the same samples, no sample may be read twice or missing,
    and the order must be that of the config.

    Args:
        config: the run's config.
        began_at: samples consumed before the data of `config` was introduced; for the steps before
            that only the ranks are compared.

    Returns:
        The findings, as text for the terminal.

    Raises:
        UserError: with the first problems.
    """
    steps = _steps(config.run_dir)
    if not steps:
        raise UserError(
            f"{config.run_dir / run_folder.LEDGER} is empty: "
            "train with data.ledger=true from the start, then verify"
        )
    streams = Streams(config)
    batch_size = config.train.global_batch_size
    problems = []
    counted = [np.zeros(0, np.int64)]
    for step in range(1, max(steps) + 1):
        ids, problem = _global_batch(steps.get(step, {}))
        consumed = (step - 1) * batch_size - began_at
        if not problem and consumed >= 0:
            counted.append(ids)
            problem = _difference(ids, streams.order.batch(consumed, batch_size))
        if problem:
            problems.append(f"step {step}: {problem}")
    counts = np.bincount(
        np.concatenate(counted), minlength=sum(len(shards) for shards in streams.shards.values())
    )
    lines = []
    first = 0
    for name, epoch in streams.epochs(max(steps) * batch_size - began_at).items():
        size = len(streams.shards[name])
        times = counts[first : first + size]
        first += size
        if times.min() < int(epoch) or times.max() > np.ceil(epoch):
            problems.append(
                f"{name}: after {epoch:.2f} epochs some sample was read {times.min()} times, "
                f"another {times.max()} times"
            )
        lines.append(
            f"{name}: {int(times.sum()):,} samples read, {epoch:.3f} epochs, "
            f"each of {size:,} {_range(times)}"
        )
    skipped_records = [
        record
        for path in run_folder.rank_files(config.run_dir, run_folder.SKIPPED)
        for record in read_lines(path, _Samples)
    ]
    if skipped := sum(len(record["ids"]) for record in skipped_records):
        lines.append(
            f"{skipped:,} of them had no loss, because their shards were bad "
            f"({config.run_dir / run_folder.SKIPPED})"
        )
    if problems:
        more = (
            [f"  and {len(problems) - _SHOWN_PROBLEMS} more"]
            if len(problems) > _SHOWN_PROBLEMS
            else []
        )
        shown = [f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
        raise UserError("\n".join([f"{config.run_dir}: the ledger has problems:", *shown, *more]))
    return "\n".join(
        [
            f"{max(steps):,} steps of {batch_size} samples: "
            "nothing skipped, nothing repeated, the order as configured",
            *lines,
        ]
    )


def read_ledger(run_dir: Path) -> dict[int, np.ndarray]:
    """Return step -> ids of its global batch, concatenated by data-parallel rank.

    Raises:
        UserError: where the records of ranks disagree or are missing.
    """
    batches = {}
    for step, parts in sorted(_steps(run_dir).items()):
        batches[step], problem = _global_batch(parts)
        if problem:
            raise UserError(f"{run_dir}: step {step}: {problem}")
    return batches


def _range(times: np.ndarray) -> str:
    low = int(times.min())
    high = int(times.max())
    return f"{low} times" if low == high else f"{low} or {high} times"


def _steps(run_dir: Path) -> dict[int, dict[tuple[int, int], list[list[int]]]]:
    """Return step -> (data-parallel rank, size) -> the ids that each such rank recorded."""
    steps: dict = defaultdict(lambda: defaultdict(list))
    for entry in _entries(run_dir):
        steps[entry["step"]][entry["data_parallel_rank"], entry["data_parallel_size"]].append(
            entry["ids"]
        )
    return steps


def _entries(run_dir: Path) -> Iterator[dict]:
    for path in run_folder.rank_files(run_dir, run_folder.LEDGER):
        yield from read_lines(path, _Read)


def _global_batch(parts: dict[tuple[int, int], list[list[int]]]) -> tuple[np.ndarray, str | None]:
    """Return the ids of a step, concatenated by rank, and a problem with them, if any."""
    sizes = {size for _, size in parts}
    ranks = sorted(rank for rank, _ in parts)
    if len(sizes) != 1 or ranks != list(range(*sizes)):
        return np.zeros(
            0, np.int64
        ), f"data-parallel ranks {ranks} recorded it, of {sorted(sizes) or 'none'}"
    for (rank, _), records in sorted(parts.items()):
        if any(ids != records[0] for ids in records):
            return np.zeros(
                0, np.int64
            ), f"the ranks of one model read different samples at data-parallel rank {rank}"
    return np.concatenate(
        [np.array(records[0], np.int64) for _, records in sorted(parts.items())]
    ), None


def _difference(ids: np.ndarray, expected: np.ndarray) -> str | None:
    if np.array_equal(ids, expected):
        return None
    missing = np.setdiff1d(expected, ids)
    extra = np.setdiff1d(ids, expected)
    if len(missing) or len(extra):
        return (
            f"{len(missing)} samples are missing (as {missing[:3].tolist()}), "
            f"{len(extra)} do not belong to it (as {extra[:3].tolist()})"
        )
    return "its samples were read by other ranks than the order determines"
