"""Test what W&B receives, from its offline files, and that two processes never send at once."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
from conftest import overrides
from wandb.proto.wandb_internal_pb2 import Record

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.runs.eval_folder import write_result
from retemper.pipeline.runs.leases import lease
from retemper.pipeline.runs.track import TrainingTracker, mirror_scores

BLOCK, HEADER = (
    32768,
    struct.Struct("<IHB"),
)  # of LevelDB's log format: checksum, length, and whether it is whole, first, middle or last


@pytest.fixture
def config(workspace, tmp_path):
    return load_config(
        overrides(workspace, "tracked", f"runs_dir={tmp_path}", "track.wandb=offline")
    )


def records(path: Path):
    """Return the records of a .wandb file."""
    content, place, record = path.read_bytes(), 7, b""
    while place + HEADER.size <= len(content):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _checksum, length, kind = HEADER.unpack_from(content, place)
        place += HEADER.size + length
        if place > len(content):
            return  # it is being written
        record += content[place - length : place]
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def finished(path: Path) -> list[Record]:
    """Return the records of a .wandb file once the last one is written.

    wandb's own process writes it a moment after the run has finished.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} is not finished after a minute")


def told(config) -> list[dict]:
    """Return every row of history, in the order of the processes that wrote them."""
    rows = []
    for path in sorted(
        config.run_dir.glob("wandb/offline-run-*/run-*.wandb"),
        key=lambda path: path.stat().st_mtime_ns,
    ):
        for record in finished(path):
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def score(config, step: int, task: str, value: float) -> None:
    scores = {"metric": "acc", "score": value, "metrics": {"acc": {"value": value, "stderr": 0.1}}}
    assert write_result(config.run_dir, step, task, scores, [{"doc_id": 0}])


def test_scores_of_workers_come_once_whoever_may_write(config):
    training = TrainingTracker(config)
    score(config, 4, "gsm8k", 0.25)
    score(config, 8, "gsm8k", 0.5)
    mirror_scores(config)  # a worker's, beside the training
    assert len(list(config.run_dir.glob("wandb/offline-run-*"))) == 1
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        training.log({"step": step, "loss": loss})
    training.close()
    first = [
        {"step": 1, "loss": 3.0},
        {"evals/gsm8k/acc": 0.25, "step": 4},
        {"evals/gsm8k/acc": 0.5, "step": 8},
    ]
    assert told(config) == [*first, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]

    mirror_scores(config)  # nothing is new
    replace_file(eval_folder.scores_path(config.run_dir, 4), '{"code": {"bits_per_byte": 1.5}}')
    for task in ("hellaswag", "arc_challenge", "winogrande"):
        score(config, 4, task, 0.5)
    assert not write_result(config.run_dir, 4, "gsm8k", {"metric": "acc", "score": 0.75}, [])
    mirror_scores(config)
    mirror_scores(config)
    new = {f"evals/{task}/acc": 0.5 for task in ("hellaswag", "arc_challenge", "winogrande")}
    new |= {"heldout/code/bits_per_byte": 1.5, "evals/forgetting": 0.5, "step": 4}
    assert told(config)[5:] == [new] and len(list(config.run_dir.glob("wandb/offline-run-*"))) == 2
    assert not list(config.run_dir.glob("wandb/*.lease.*"))


def test_an_error_is_told_to_nobody_and_replaced_by_scores(config):
    assert write_result(config.run_dir, 4, "gsm8k", {"error": "no such file"}, [])
    mirror_scores(config)
    assert not (config.run_dir / "wandb").exists()
    score(config, 4, "gsm8k", 0.25)
    mirror_scores(config)
    assert told(config) == [{"evals/gsm8k/acc": 0.25, "step": 4}]


def test_a_killed_training_is_continued_at_once_and_mirrored_by_others_when_its_lease_is_over(
    config,
):
    folder = config.run_dir / "wandb"
    folder.mkdir(parents=True)
    (folder / "training.lease.1").touch()  # as of a moment ago
    score(config, 4, "gsm8k", 0.25)
    mirror_scores(config)
    assert not told(config)
    TrainingTracker(config).close()
    assert told(config) == [{"evals/gsm8k/acc": 0.25, "step": 4}]

    score(config, 4, "arc_challenge", 0.5)
    os.utime(folder / "training.lease.1", (0, 0))
    with lease(folder, "mirroring", 120):
        mirror_scores(config)  # another worker is at it
    assert len(told(config)) == 1
    mirror_scores(config)
    assert told(config)[1:] == [{"evals/arc_challenge/acc": 0.5, "step": 4}]
