"""Batches that spoil a run: seen on every rank alike before a weight changes, and left out after a rollback; and signals to stop."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch, overrides, run_command

from retemper.pipeline import run_folder
from retemper.pipeline.checkpoint.commit import committed_steps

STEPS = 30
RUN = ["parallel=tp2", "checkpoint.save_every_steps=5", "evals.heldout={}", f"train.tokens={STEPS * 8 * 64}", "optimizer.lr=1e-3"]
ROLLBACK = ["anomaly.policy=rollback", "anomaly.spike_deviations=40"]  # a gradient norm of real text leaps by up to 34
SPOILED = {"nan_gradient": 7, "garbage_batch": 21}  # fault -> the step that it spoils


@pytest.fixture(scope="module")
def runs(workspace):
    folder = workspace / "runs" / "test"
    launch(2, [{"overrides": overrides(workspace, "unspoiled", *RUN, *ROLLBACK)}])
    for fault, step in SPOILED.items():
        # What a run is that never had the batch: told from the start to leave it out.
        run_folder.append_line(folder / f"{fault}-without" / run_folder.LEFT_OUT, {"step": step, "rollback": step, "what": "told"})
        launch(2, [{"overrides": overrides(workspace, f"{fault}-without", *RUN, *ROLLBACK)}])
        launch(2, [{"overrides": overrides(workspace, fault, *RUN, *ROLLBACK), "fault": fault}])
    return folder


def curve(run: Path) -> dict[int, tuple[float, float, float]]:
    return {record["step"]: tuple(record[key] for key in ("loss", "grad_norm", "lr")) for record in run_folder.read_metrics(run)}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_rollback_trains_on_as_if_the_batch_had_never_been(runs, fault):
    step = SPOILED[fault]
    straight, without = curve(runs / fault), curve(runs / f"{fault}-without")
    assert straight == without and sorted(straight) == [number for number in range(1, STEPS + 1) if number != step]
    unspoiled = curve(runs / "unspoiled")
    assert all(straight[number] == unspoiled[number] for number in range(1, step)) and straight[STEPS][0] != unspoiled[STEPS][0]
    assert all(straight[number][2] == unspoiled[number][2] for number in straight)  # the rate counts tokens, the batch's too
    (record,) = run_folder.read_lines(runs / fault / run_folder.LEFT_OUT)
    assert (record["step"], record["rollback"]) == (step, step)
    assert {"nan_gradient": "gradient norm is nan", "garbage_batch": "deviations above"}[fault] in record["what"]


def test_an_unspoiled_run_is_left_alone(runs):
    assert sorted(curve(runs / "unspoiled")) == list(range(1, STEPS + 1)) and not (runs / "unspoiled" / run_folder.LEFT_OUT).exists()


def test_a_run_that_is_to_stop_says_what_to_do_and_has_saved_nothing_spoiled(workspace, runs):
    with pytest.raises(AssertionError, match="(?s)step 7: the gradient norm is nan. It changed no weight.*anomaly.policy=rollback"):
        launch(2, [{"overrides": overrides(workspace, "stops", *RUN), "fault": "nan_gradient"}])
    assert committed_steps(runs / "stops") == [5] and max(curve(runs / "stops")) == 6


@pytest.mark.slow
def test_a_trace_of_the_steps_that_were_asked_for(workspace):
    launch(2, [{"overrides": overrides(workspace, "profiled", "parallel=dp2", "profile.steps=[3,4]", "evals.heldout={}")}])
    trace = json.loads((workspace / "runs" / "test" / "profiled" / run_folder.PROFILE / "steps-3-4.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("ProfilerStep" in name for name in names) == 2 and any("aten::mm" in name for name in names)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(workspace):
    command = ["train", *overrides(workspace, "signalled", *RUN)]
    folder = workspace / "runs" / "test" / "signalled"
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "retemper"), *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while len(list(run_folder.read_metrics(folder))) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    saved = committed_steps(folder)[-1]
    assert 7 <= saved < STEPS and f"saved after step {saved}" in said and process.returncode == 130
    assert saved == max(curve(folder)), "nothing that was done is lost"
    continued = run_command(command)
    assert continued.returncode == 0, continued.stderr[-3000:]
    launch(2, [{"overrides": overrides(workspace, "unsignalled", *RUN)}])
    assert curve(folder) == curve(folder.with_name("unsignalled"))
