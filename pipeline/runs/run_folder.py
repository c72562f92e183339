"""What a run leaves on disk, in runs_dir/study/name.

That is config.json, base.json, metrics.jsonl, checkpoints/ and evals/<step>/.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.jsonl import read_lines
from retemper.pipeline.schema.run import Config

METRICS, LEDGER, SKIPPED = (
    "metrics.jsonl",
    "ledger",
    "skipped",
)  # one line a step; the latter two are folders of a file a rank
LEFT_OUT = "left_out.jsonl"  # one line a batch that a rollback left out
PROFILE = "profile"

# What a restart may change: where and how the run computes, and what is watched, but not what it computes.
MAY_CHANGE = (
    "parallel.",
    "checkpoint.",
    "anomaly.",
    "profile.",
    "evals.",
    "track.",
    "runs_dir:",
    "init_from:",  # to where the base is now; which one it is, base.json says
    "branch_of:",
    "train.branches:",
    "train.micro_batch_size:",
    "train.log_every_steps:",
    "train.cuda_graph:",
    "method.lora.kernel:",
    "fp8.keep_transposed:",
    # The checkpoint's fingerprints guard the content of these.
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


def check(config: Config) -> None:
    """Refuse a folder that belongs to another config, before anything starts. Raises UserError with the keys that differ."""
    path = config.run_dir / "config.json"
    if not path.is_file():
        return
    stored = _with_new_keys(json.loads(path.read_text()))
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
                    f"{config.run_dir} belongs to a run with another config:",
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
    """A stored config with the defaults of keys that came after it was written: such a run had those values."""
    try:
        return json.loads(Config.model_validate(stored).to_json())
    except ValidationError:
        return stored  # of another schema: the difference says so


def is_of_data(change: str) -> bool:
    """Whether data.allow_change covers it; samples of another length would change what a step is."""
    return change.startswith("data.") and not change.startswith("data.seq_length:")


def claim(config: Config, step: int) -> None:
    """Write config.json, and drop what was noted after `step`, which the resumed run will note again. Rank 0 only."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(config.run_dir / "config.json", config.to_json())
    for path in (
        config.run_dir / METRICS,
        *noted(config.run_dir, LEDGER),
        *noted(config.run_dir, SKIPPED),
    ):
        replace_file(
            path,
            "".join(
                json.dumps(record) + "\n" for record in read_lines(path) if record["step"] <= step
            ),
        )
    for scored in (config.run_dir / "evals").glob("[0-9]*"):
        if int(scored.name) > step:
            shutil.rmtree(scored)


def noted(run_dir: Path, name: str) -> list[Path]:
    """The files of all ranks in LEDGER or SKIPPED."""
    return sorted((run_dir / name).glob("rank-*.jsonl"))


def read_metrics(run_dir: Path) -> Iterator[dict]:
    """The records of metrics.jsonl."""
    return read_lines(run_dir / METRICS)
