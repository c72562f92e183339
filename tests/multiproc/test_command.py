"""The command as a person uses it: train, be killed, run it again; and what it says of bad input."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, overrides, run_command

from retemper.pipeline import run_folder
from retemper.pipeline.checkpoint.commit import committed_steps

SAVE = ["parallel=tp2", "checkpoint.save_every_steps=5", "evals.heldout={}"]


def records(workspace, name):
    return list(run_folder.read_metrics(workspace / "runs" / "test" / name))


@pytest.fixture(scope="module")
def killed_and_continued(workspace):
    """One run straight through, and one whose ranks are killed after the first checkpoint and that is started again."""
    straight = run_command(["train", *overrides(workspace, "straight", *SAVE)])
    assert straight.returncode == 0, straight.stderr[-3000:]
    command = [str(Path(sys.executable).parent / "retemper"), "train", *overrides(workspace, "killed", *SAVE)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = workspace / "runs" / "test" / "killed"
    deadline = time.monotonic() + 120
    while not committed_steps(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = committed_steps(folder)
    continued = run_command(["train", *overrides(workspace, "killed", *SAVE)])
    assert continued.returncode == 0, continued.stderr[-3000:]
    return left, continued


def test_the_same_command_continues_a_killed_run(killed_and_continued, workspace):
    left, continued = killed_and_continued
    assert left == [5]
    assert "step      6" in continued.stdout and "step      5" not in continued.stdout
    straight, killed = records(workspace, "straight"), records(workspace, "killed")
    for key in ("step", "tokens", "loss", "grad_norm", "lr"):
        assert [record[key] for record in killed] == [record[key] for record in straight], key


def test_a_finished_run_is_left_alone(killed_and_continued, workspace):
    before = records(workspace, "straight")
    again = run_command(["train", *overrides(workspace, "straight", *SAVE)])
    assert again.returncode == 0
    assert records(workspace, "straight") == before


def test_a_run_folder_of_another_config_is_refused_with_the_keys(killed_and_continued, workspace):
    before = records(workspace, "straight")
    result = run_command(["train", *overrides(workspace, "straight", *SAVE, "optimizer.lr=1e-4", "model.num_layers=4")])
    assert result.returncode == 1
    assert "optimizer.lr: 0.005 -> 0.0001" in result.stderr and "model.num_layers: 2 -> 4" in result.stderr
    assert "Traceback" not in result.stderr
    assert records(workspace, "straight") == before


def test_a_damaged_checkpoint_is_refused_by_name(killed_and_continued, workspace):
    folder = workspace / "runs" / "test" / "killed" / "checkpoints" / "step-00000010"
    victim = next(folder.glob("*.distcp"))
    content = victim.read_bytes()
    victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    try:
        result = run_command(["train", *overrides(workspace, "killed", *SAVE)])
    finally:
        victim.write_bytes(content)
    assert result.returncode != 0
    assert str(victim) in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1


def test_eval_scores_the_checkpoints_of_a_run(killed_and_continued, workspace):
    heldout = [f"evals.heldout.code={workspace / 'data' / 'code'}"]
    result = run_command(["eval", *overrides(workspace, "straight", *SAVE[:2], *heldout)])
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(run_folder.read_scores(workspace / "runs" / "test" / "straight")) == {5, 10}


def test_torchrun_with_the_wrong_number_of_ranks_is_refused(workspace):
    command = [sys.executable, "-m", "retemper.pipeline.train", *overrides(workspace, "alone", "parallel=tp2")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "The launch has 1 rank, but the config needs 2" in result.stderr
