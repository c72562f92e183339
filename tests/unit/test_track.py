"""Test the rows that W&B receives, read from its offline files, and that one process sends them."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
from conftest import overrides
from wandb.proto.wandb_internal_pb2 import Record

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.runs.eval_folder import write_result
from retemper.pipeline.runs.leases import lease
from retemper.pipeline.runs.track import TrainingTracker, mirror_scores

# LevelDB's log format: the header of a piece has a checksum, a length, and whether the piece is a
# whole record, or the first, a middle or the last piece of one.
BLOCK = 32768
HEADER = struct.Struct("<IHB")


@pytest.fixture
def config(workspace, tmp_path):
    return load_config(
        overrides(workspace, "tracked", f"runs_dir={tmp_path}", "track.wandb=offline")
    )


def records(path: Path):
    """Yield the records of a .wandb file."""
    content = path.read_bytes()
    position = 7
    record = b""
    while position + HEADER.size <= len(content):
        if BLOCK - position % BLOCK < HEADER.size:
            position += BLOCK - position % BLOCK
            continue
        _checksum, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size + length
        if position > len(content):
            return  # the last record is still being written
        record += content[position - length : position]
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def finished_records(path: Path) -> list[Record]:
    """Return the records of a .wandb file once the last one is written.

    wandb's own process writes that one a moment after the run has finished.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} is not finished after a minute")


def history_rows(config) -> list[dict]:
    """Return every row of W&B's history, in the order of the processes that wrote them."""
    rows = []
    for path in sorted(
        config.run_dir.glob("wandb/offline-run-*/run-*.wandb"),
        key=lambda path: path.stat().st_mtime_ns,
    ):
        for record in finished_records(path):
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def score(config, step: int, task: str, value: float) -> None:
    scores = Estimate(value, 0.1, value - 0.2, value + 0.2, 10).headline("acc") | {
        "metrics": {"acc": {"value": value, "stderr": 0.1}},
        "decontaminated": {},
        "settings": {},
    }
    assert write_result(config.run_dir, step, task, scores, [{"doc_id": 0}])


def test_scores_of_workers_are_sent_once_by_the_training_or_a_worker(config):
    training = TrainingTracker(config)
    score(config, 4, "gsm8k", 0.25)
    score(config, 8, "gsm8k", 0.5)
    mirror_scores(config)  # as a worker does during the training
    assert len(list(config.run_dir.glob("wandb/offline-run-*"))) == 1
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        training.log({"step": step, "loss": loss})
    training.close()
    first = [
        {"step": 1, "loss": 3.0},
        {"evals/gsm8k/acc": 0.25, "step": 4},
        {"evals/gsm8k/acc": 0.5, "step": 8},
    ]
    assert history_rows(config) == [*first, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]

    mirror_scores(config)  # there is nothing new to send
    code = {"bits_per_byte": 1.5, "stderr": 0.1, "interval": [1.3, 1.7], "samples": 1}
    eval_folder.write_heldout(config.run_dir, 4, {"code": code}, {})
    for task in ("hellaswag", "arc_challenge", "winogrande"):
        score(config, 4, task, 0.5)
    assert not write_result(config.run_dir, 4, "gsm8k", {"metric": "acc", "score": 0.75}, [])
    mirror_scores(config)
    mirror_scores(config)
    new = {f"evals/{task}/acc": 0.5 for task in ("hellaswag", "arc_challenge", "winogrande")}
    new |= {"heldout/code/bits_per_byte": 1.5, "evals/forgetting": 0.5, "step": 4}
    assert history_rows(config)[5:] == [new]
    assert len(list(config.run_dir.glob("wandb/offline-run-*"))) == 2
    assert not list(config.run_dir.glob("wandb/*.lease.*"))


def test_evaluation_error_is_not_sent_and_later_scores_are(config):
    assert write_result(config.run_dir, 4, "gsm8k", {"error": "no such file"}, [])
    mirror_scores(config)
    assert not (config.run_dir / "wandb").exists()
    score(config, 4, "gsm8k", 0.25)
    mirror_scores(config)
    assert history_rows(config) == [{"evals/gsm8k/acc": 0.25, "step": 4}]


def test_scores_wait_for_the_lease_of_a_killed_training_or_its_restart(
    config,
):
    folder = config.run_dir / "wandb"
    folder.mkdir(parents=True)
    (folder / "training.lease.1").touch()  # renewed a moment ago
    score(config, 4, "gsm8k", 0.25)
    mirror_scores(config)
    assert not history_rows(config)
    TrainingTracker(config).close()
    assert history_rows(config) == [{"evals/gsm8k/acc": 0.25, "step": 4}]

    score(config, 4, "arc_challenge", 0.5)
    os.utime(folder / "training.lease.1", (0, 0))
    with lease(folder, "mirroring", 120):
        mirror_scores(config)  # another worker is sending
    assert len(history_rows(config)) == 1
    mirror_scores(config)
    assert history_rows(config)[1:] == [{"evals/arc_challenge/acc": 0.5, "step": 4}]
