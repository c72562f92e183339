"""Test that every step has the samples of an uninterrupted run, whatever interrupted it.

A run is killed anywhere, and continues under another topology.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SEQ_LENGTH, overrides, run_command

from retemper.pipeline.data.ledger import read_ledger
from retemper.pipeline.runs import run_folder

STEPS = 60
LAYOUTS = {
    "single": [],
    "dp2": ["parallel=dp2"],
    "dp4": ["parallel.data_parallel_size=4"],
    "tp2": ["parallel=tp2"],
    "pp2": ["parallel=pp2"],
}


@pytest.fixture(scope="module")
def command(workspace):
    """Return command(name, layout) -> the overrides of a run.

    The run has 60 steps of LoRA with dropout, on code with replay of mathematics.
    """
    base = overrides(workspace, "restarts-base", "parallel.data_parallel_size=1")
    assert run_command(["train", *base]).returncode == 0

    def command(name: str, layout: str) -> list[str]:
        return overrides(
            workspace,
            name,
            f"init_from={workspace / 'runs' / 'test' / 'restarts-base'}",
            "method=lora",
            "method.lora.dropout=0.1",
            "optimizer.lr=1e-3",
            f"train.tokens={STEPS * 8 * SEQ_LENGTH}",
            "data.ledger=true",
            f"data.replay.path={workspace / 'data' / 'math'}",
            "data.replay.fraction=0.1",
            "checkpoint.save_every_steps=3",
            *LAYOUTS[layout],
            corpus="code",
        )

    return command


def start(command: list[str], log: Path) -> subprocess.Popen:
    program = str(Path(sys.executable).parent / "retemper")
    with open(log, "w") as output:
        return subprocess.Popen(
            [program, "train", *command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def killed_run(
    command, folder: Path, name: str, layouts: list[str], rng: random.Random, log: Path
) -> None:
    """Train `name`: killed once under each layout but the last, under which it ends."""
    for layout in layouts[:-1]:
        process, before = start(command(name, layout), log), last_step(folder)
        until, moment = before + rng.randint(2, 14), rng.uniform(0, 0.5)
        while last_step(folder) < until:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(command(name, layouts[-1]), log).wait(timeout=300) == 0, log.read_text()[-3000:]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in run_folder.read_metrics(folder)), default=0)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in run_folder.read_metrics(folder)]


@pytest.mark.slow
def test_five_kills_at_five_layouts_change_no_sample(command, workspace, tmp_path):
    runs = workspace / "runs" / "test"
    assert start(command("straight", "single"), tmp_path / "log").wait(timeout=300) == 0
    killed_run(
        command,
        runs / "killed-all",
        "killed-all",
        ["single", "dp4", "tp2", "dp2", "pp2", "dp4"],
        random.Random(3),
        tmp_path / "log",
    )
    expected, got = read_ledger(runs / "straight"), read_ledger(runs / "killed-all")
    assert list(expected) == list(got) == list(range(1, STEPS + 1))
    assert all((expected[step] == got[step]).all() for step in expected)
    assert losses(runs / "killed-all") == pytest.approx(
        losses(runs / "straight"), rel=0.02
    )  # dropout differs between topologies
    result = run_command(["data", "verify", str(runs / "killed-all")])
    assert (
        result.returncode == 0
        and "60 steps of 8 samples: nothing skipped, nothing repeated" in result.stdout
    ), result.stderr


@pytest.mark.slow
def test_five_kills_at_one_layout_change_no_bit(command, workspace, tmp_path):
    runs = workspace / "runs" / "test"
    assert start(command("straight-dp2", "dp2"), tmp_path / "log").wait(timeout=300) == 0
    killed_run(
        command, runs / "killed-dp2", "killed-dp2", ["dp2"] * 6, random.Random(4), tmp_path / "log"
    )
    assert (
        losses(runs / "killed-dp2") == losses(runs / "straight-dp2")
        and len(losses(runs / "killed-dp2")) == STEPS
    )
