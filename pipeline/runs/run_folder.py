"""The files of a run, in runs_dir/study/name.

They are config.json, base.json, metrics.jsonl, checkpoints/ and evals/<step>/.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from pydantic import ValidationError

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.config.stored import read_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.json_file import with_other_keys
from retemper.pipeline.files.jsonl import read_lines, sound_lines
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.schema.run import Config

# One line per step; the latter two are folders with one file per rank.
METRICS, LEDGER, SKIPPED = ("metrics.jsonl", "ledger", "skipped")
SKIPPED_BATCHES = "skipped_batches.jsonl"  # one line per batch that is skipped after a rollback
_OLD_SKIPPED_BATCHES = "left_out.jsonl"  # its name in older runs
PROFILE = "profile"

# The keys that a restart may change: where and how the run computes, and what is recorded, but not
# what it computes.
MAY_CHANGE = (
    "parallel.",
    "checkpoint.",
    "anomaly.",
    "profile.",
    "evals.",
    "track.",
    "runs_dir:",
    "init_from:",  # to where the base is now; base.json records which one it is
    "branch_of:",
    "train.branches:",
    # Each is another form of a key that may not change.
    "train.epochs:",
    "schedule.warmup_fraction:",
    "train.micro_batch_size:",
    "train.log_every_steps:",
    "train.cuda_graph:",
    "method.lora.kernel:",
    "fp8.keep_transposed:",
    # The contents behind these keys are checked by the checkpoint's fingerprints.
    "data.path:",
    "data.tokenizer:",
    "data.tasks:",
    "data.executor:",
    "data.slurm",
    "data.work_dir:",
    "data.source.",
    "data.cache_dir:",
    "data.bad_shards:",
    "data.ledger:",
    "data.allow_change:",
)


@with_other_keys
class OfStep(TypedDict):
    """A record of one step."""

    step: int


@with_other_keys
class SkippedBatch(OfStep):
    """A record of SKIPPED_BATCHES."""

    rollback: int


@with_other_keys
class _Metrics(OfStep):
    """What is read of a record of METRICS."""

    tokens: int
    tokens_per_second: float


def check_resumable(config: Config) -> None:
    """Check before anything starts that the run's folder does not belong to another config.

    Raises:
        UserError: keys differ that a restart may not change; the message lists them.
    """
    stored = read_config(config.run_dir)
    if stored is None:
        return
    stored = _with_new_keys(stored)
    began_otherwise = (stored.get("init_from") is None) != (config.init_from is None)
    changes = [
        change
        for change in changed_keys(stored, json.loads(config.to_json()))
        if not change.startswith(MAY_CHANGE)
        or (began_otherwise and change.startswith("init_from:"))
    ]
    if config.data.allow_change:
        changes = [change for change in changes if not is_of_data(change)]
    if changes:
        raise UserError(
            "\n".join(
                [
                    f"{config.run_dir / 'config.json'} belongs to a run with another config:",
                    *(f"  - {change}" for change in changes),
                ]
            )
            + "\nChange the keys back to continue it, or set another name"
            + (
                "; data.allow_change=true continues it with the new data"
                if all(map(is_of_data, changes))
                else ""
            )
        )


def _with_new_keys(stored: dict) -> dict:
    """Return a stored config, completed by the defaults of keys that were introduced later.

    A run from before such a key behaved as its default does.
    """
    try:
        return json.loads(Config.model_validate(stored).to_json())
    except ValidationError:
        return stored  # of another schema: the comparison will list the keys


def is_of_data(change: str) -> bool:
    """Return whether data.allow_change covers a changed key.

    It does not cover data.seq_length: samples of another length would change the meaning of a step.
    """
    return change.startswith("data.") and not change.startswith("data.seq_length:")


def start_or_resume(config: Config, step: int) -> None:
    """Write config.json, and remove all records after `step`. Rank 0 only.

    The resumed run will write these records again.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(config.run_dir / "config.json", config.to_json())
    for path in (
        config.run_dir / METRICS,
        *rank_files(config.run_dir, LEDGER),
        *rank_files(config.run_dir, SKIPPED),
    ):
        kept = [record for record in sound_lines(path, OfStep) if record["step"] <= step]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
    for scored in eval_folder.scored_steps(config.run_dir):
        if scored > step:
            shutil.rmtree(eval_folder.scores_path(config.run_dir, scored).parent)


def rank_files(run_dir: Path, name: str) -> list[Path]:
    """Return the files of all ranks in the folder LEDGER or SKIPPED."""
    return sorted((run_dir / name).glob("rank-*.jsonl"))


def read_skipped_batches(run_dir: Path) -> list[dict]:
    """Return the records of the batches that rollbacks skipped."""
    files = (SKIPPED_BATCHES, _OLD_SKIPPED_BATCHES)
    return [record for name in files for record in read_lines(run_dir / name, SkippedBatch)]


def read_metrics(run_dir: Path) -> Iterator[dict]:
    """Yield the sound records of metrics.jsonl; the number of others is printed on stderr."""
    return sound_lines(run_dir / METRICS, _Metrics)
