"""Test batches that spoil a run, and signals to stop.

Every rank detects such a batch before a weight changes; after a rollback it is skipped.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, data_config, launch, overrides, run_command

from retemper.pipeline.checkpoint.commit import META, committed_steps, folder_of
from retemper.pipeline.files.jsonl import append_line, read_lines
from retemper.pipeline.runs import run_folder

STEPS = 30
RUN = [
    "parallel=tp2",
    "checkpoint.save_every_steps=5",
    "evals.heldout={}",
    f"train.tokens={STEPS * 8 * 64}",
    "optimizer.lr=1e-3",
]
ROLLBACK = [
    "anomaly.policy=rollback",
    "anomaly.spike_deviations=40",
]  # a gradient norm of real text leaps by up to 34
SPOILED = {"nan_gradient": 7, "garbage_batch": 21}  # fault -> the step that it spoils


@pytest.fixture(scope="module")
def unreadable(workspace) -> Path:
    """Return a corpus of 32 samples, four steps, all of whose shards are damaged."""
    from retemper.tokenize.job import tokenize

    source = {"kind": "text", "path": str(Path(json.__file__).parent), "glob": "**/*.py"}
    corpus = data_config(
        workspace, "unreadable", source=source, tokens=32 * 64, heldout_fraction=0.0
    )
    tokenize(corpus, progress=False)
    for shard in Path(corpus.path, "train").rglob("*.mds"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    return Path(corpus.path)


@pytest.fixture(scope="module")
def runs(workspace, unreadable):
    folder = workspace / "runs" / "test"
    skipping = [f"data.path={unreadable}", "data.name=unreadable", "data.bad_shards=skip"]
    launch(
        2,
        [
            {"overrides": overrides(workspace, "unspoiled", *RUN, *ROLLBACK)},
            {
                "overrides": overrides(workspace, "unlabelled", *RUN, *ROLLBACK),
                "fault": "no_labels",
            },
            {
                "overrides": overrides(workspace, "never-labelled", *RUN, *skipping),
                "refused": "step 4: an epoch of the data (unreadable)",
            },
        ],
    )
    for fault, step in SPOILED.items():
        # What a run is that never had the batch: told from the start to leave it out.
        append_line(
            folder / f"{fault}-without" / run_folder.SKIPPED_BATCHES,
            {"step": step, "rollback": step, "reason": "told"},
        )
        launch(2, [{"overrides": overrides(workspace, f"{fault}-without", *RUN, *ROLLBACK)}])
        launch(2, [{"overrides": overrides(workspace, fault, *RUN, *ROLLBACK), "fault": fault}])
    return folder


def curve(run: Path) -> dict[int, tuple[float, float, float]]:
    return {
        record["step"]: tuple(record[key] for key in ("loss", "grad_norm", "lr"))
        for record in run_folder.read_metrics(run)
    }


@pytest.mark.parametrize("fault", SPOILED)
def test_a_rollback_equals_a_run_without_the_batch(runs, fault):
    step = SPOILED[fault]
    straight, without = curve(runs / fault), curve(runs / f"{fault}-without")
    assert straight == without and sorted(straight) == [
        number for number in range(1, STEPS + 1) if number != step
    ]
    unspoiled = curve(runs / "unspoiled")
    assert (
        all(straight[number] == unspoiled[number] for number in range(1, step))
        and straight[STEPS][0] != unspoiled[STEPS][0]
    )
    assert all(
        straight[number][2] == unspoiled[number][2] for number in straight
    )  # the rate counts tokens, the batch's too
    (record,) = read_lines(runs / fault / run_folder.SKIPPED_BATCHES, dict)
    assert (record["step"], record["rollback"]) == (step, step)
    assert {"nan_gradient": "gradient norm is nan", "garbage_batch": "deviations above"}[
        fault
    ] in record["reason"]


def test_a_run_without_anomalies_is_unchanged(runs):
    assert (
        sorted(curve(runs / "unspoiled")) == list(range(1, STEPS + 1))
        and not (runs / "unspoiled" / run_folder.SKIPPED_BATCHES).exists()
    )


def test_a_step_without_labels_has_no_loss_and_no_statistics(runs):
    records = {record["step"]: record for record in run_folder.read_metrics(runs / "unlabelled")}
    unspoiled = curve(runs / "unspoiled")
    assert sorted(records) == list(range(1, STEPS + 1)) and [
        step for step in records if "loss" not in records[step]
    ] == [7, 9]
    assert all(
        records[step]["grad_norm"] == 0 and records[step]["lr"] == unspoiled[step][2]
        for step in (7, 9)
    )
    assert all(
        math.isfinite(value)
        for step in records
        for key, value in records[step].items()
        if key in ("loss", "grad_norm", "lr")
    )
    assert all(records[step]["loss"] == unspoiled[step][0] for step in range(1, 7))
    recent = json.loads((folder_of(runs / "unlabelled", STEPS) / META).read_text())["train_state"]
    expected = {
        key: [record[key] for step, record in records.items() if step not in (7, 9)]
        for key in ("loss", "grad_norm")
    }
    assert (
        recent["recent_losses"] == expected["loss"]
        and recent["recent_grad_norms"] == expected["grad_norm"]
    )


def test_an_epoch_without_a_label_ends_the_run(runs):
    records = list(run_folder.read_metrics(runs / "never-labelled"))
    assert [record["step"] for record in records] == [1, 2, 3, 4] and not any(
        "loss" in record for record in records
    )


def test_a_stopped_run_gives_advice_and_saves_no_anomaly(workspace, runs):
    with pytest.raises(
        AssertionError,
        match="(?s)step 7: the gradient norm is nan. It changed no weight.*anomaly.policy=rollback",
    ):
        launch(2, [{"overrides": overrides(workspace, "stops", *RUN), "fault": "nan_gradient"}])
    assert committed_steps(runs / "stops") == [5] and max(curve(runs / "stops")) == 6


@pytest.mark.slow
def test_the_requested_steps_are_traced(workspace):
    launch(
        2,
        [
            {
                "overrides": overrides(
                    workspace, "profiled", "parallel=dp2", "profile.steps=[3,4]", "evals.heldout={}"
                )
            }
        ],
    )
    trace = json.loads(
        (
            workspace / "runs" / "test" / "profiled" / run_folder.PROFILE / "steps-3-4.json"
        ).read_text()
    )
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("ProfilerStep" in name for name in names) == 2 and any(
        "aten::mm" in name for name in names
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_the_command_that_is_printed_continues(workspace):
    command = ["train", *overrides(workspace, "signalled", *RUN)]
    folder = workspace / "runs" / "test" / "signalled"
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "retemper"), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(list(run_folder.read_metrics(folder))) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, also to the ranks
    said, errors = process.communicate(timeout=60)
    saved = committed_steps(folder)[-1]
    assert 7 <= saved < STEPS and f"saved after step {saved}" in said and process.returncode == 130
    assert saved == max(curve(folder)), "nothing that was done is lost"
    (printed,) = re.findall("stopped; to continue: retemper (.*)", errors)
    assert shlex.split(printed) == command
    continued = run_command(shlex.split(printed))
    assert continued.returncode == 0, continued.stderr[-3000:]
    launch(2, [{"overrides": overrides(workspace, "unsignalled", *RUN)}])
    assert curve(folder) == curve(folder.with_name("unsignalled"))
