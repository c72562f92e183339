"""Test the command as a user runs it: train, kill it, run it again; and its errors on bad input."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, overrides, run_command
from shared_memory import abandoned

from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.ledger import read_ledger
from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.plan import checkpoint_bytes
from retemper.pipeline.runs import eval_folder, run_folder

SAVE = ["parallel=tp2", "checkpoint.save_every_steps=5", "data.ledger=true"]


def records(workspace, name):
    return list(run_folder.read_metrics(workspace / "runs" / "test" / name))


@pytest.fixture(scope="module")
def killed_and_continued(workspace):
    """Train one run straight through, and one that is killed and started again.

    The torchrun agent of the second is killed after the first checkpoint.
    """
    straight = run_command(["train", *overrides(workspace, "straight", *SAVE)])
    assert straight.returncode == 0, straight.stderr[-3000:]
    command = [
        str(Path(sys.executable).parent / "retemper"),
        "train",
        *overrides(workspace, "killed", *SAVE),
    ]
    before = abandoned()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = workspace / "runs" / "test" / "killed"
    deadline = time.monotonic() + 120
    while not committed_steps(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # the agent alone: its ranks must not live on and write
    process.wait()
    psutil.wait_procs(ranks, timeout=20)
    assert len(ranks) >= 2 and not any(rank.is_running() for rank in ranks)
    assert abandoned() <= before, "a killed run leaves nothing that its restart could meet"
    left = committed_steps(folder)
    # Variables that another launch has left in the shell have no effect.
    stale = {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "5", "WORLD_SIZE": "7", "RANK": "3"}
    stale |= {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "192.0.2.1"}
    continued = run_command(
        ["train", *overrides(workspace, "killed", *SAVE)], env=os.environ | stale
    )
    assert continued.returncode == 0, continued.stderr[-3000:]
    return left, continued


def test_the_same_command_continues_a_killed_run(killed_and_continued, workspace):
    left, continued = killed_and_continued
    assert left == [5]
    assert "step      6" in continued.stdout and "step      5" not in continued.stdout
    straight, killed = records(workspace, "straight"), records(workspace, "killed")
    for key in ("step", "tokens", "loss", "grad_norm", "lr"):
        assert [record[key] for record in killed] == [record[key] for record in straight], key


def test_metrics_report_the_hardware(killed_and_continued, workspace):
    config = load_config(overrides(workspace, "straight", *SAVE))
    for record in records(workspace, "straight"):
        assert record["tokens_per_second_per_gpu"] * 2 == pytest.approx(record["tokens_per_second"])
        assert record["model_flops_per_second"] == pytest.approx(
            record["tokens_per_second"] * flops_per_token(config.model, None, 64)
        )
        assert "mfu" not in record and 100 << 20 < record["peak_memory_bytes"] < 10 << 30
        # The save after step 5 kept step 6 waiting; of the last one no record follows.
        assert (record["checkpoint_seconds"] > 0) == (record["step"] == 6)


def test_a_checkpoint_has_the_size_that_is_planned(killed_and_continued, workspace):
    config = load_config(overrides(workspace, "straight", *SAVE))
    written = sum(
        path.stat().st_size
        for path in (config.run_dir / "checkpoints" / "step-00000010").glob("*.distcp")
    )
    assert checkpoint_bytes(config) == pytest.approx(written, rel=0.1)


def test_the_ledger_verifies_the_samples_read(killed_and_continued, workspace, capsys):
    folder = workspace / "runs" / "test" / "killed"
    straight, killed = read_ledger(workspace / "runs" / "test" / "straight"), read_ledger(folder)
    assert list(killed) == list(range(1, 11)) and all(
        (killed[step] == straight[step]).all() for step in straight
    )
    verify = ["data", "verify", str(folder)]
    assert main(verify) == 0
    assert "10 steps of 8 samples: nothing skipped, nothing repeated" in capsys.readouterr().out
    notes = sorted((folder / "ledger").glob("*.jsonl"))
    assert len(notes) == 2
    whole = {note: note.read_text().splitlines(keepends=True) for note in notes}
    for change, said in (
        (lambda lines: lines[:3] + lines[4:], "step 4: data-parallel ranks [] recorded it"),
        (
            lambda lines: [*lines[:3], lines[2].replace('"step": 3', '"step": 4'), *lines[4:]],
            "step 4: 8 samples are missing",
        ),
    ):
        for note in notes:
            note.write_text("".join(change(whole[note])))
        assert main(verify) == 1
        assert said in capsys.readouterr().err
    for note in notes:
        note.write_text("".join(whole[note]))


def test_a_run_folder_of_another_config_is_refused_with_the_keys(killed_and_continued, workspace):
    before = records(workspace, "straight")
    result = run_command(
        [
            "train",
            *overrides(workspace, "straight", *SAVE, "optimizer.lr=1e-4", "model.num_layers=4"),
        ]
    )
    assert result.returncode == 1
    assert (
        "optimizer.lr: 0.005 -> 0.0001" in result.stderr
        and "model.num_layers: 2 -> 4" in result.stderr
    )
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


def test_eval_scores_checkpoints_without_scores(killed_and_continued, workspace):
    folder = workspace / "runs" / "test" / "straight"
    before = eval_folder.read_scores(folder)
    assert set(before) == {0, 10}
    eval_folder.scores_path(folder, 0).unlink()
    result = run_command(["eval", "run", str(folder), "parallel=dp2"])
    assert result.returncode == 0, result.stderr[-3000:]
    after = eval_folder.read_scores(folder)
    assert set(after) == {0, 5, 10} and after[10] == before[10]
    for domain, scores in before[0].items():  # of another layout
        assert after[0][domain]["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-5)
    assert (
        after[10]["math"]["bits_per_byte"]
        < after[5]["math"]["bits_per_byte"]
        < after[0]["math"]["bits_per_byte"]
    )


def test_torchrun_with_the_wrong_number_of_ranks_is_refused(workspace):
    command = [
        sys.executable,
        "-m",
        "retemper.pipeline.train",
        *overrides(workspace, "alone", "parallel=tp2"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "The launch has 1 rank, but the config needs 2" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_is_one_error_and_keeps_earlier_checkpoints(workspace, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], check=True)
    try:
        result = run_command(
            [
                "train",
                *overrides(
                    workspace,
                    "full-disk",
                    "parallel=tp2",
                    "checkpoint.save_every_steps=1",
                    f"runs_dir={tmp_path}",
                ),
            ]
        )
        steps = committed_steps(tmp_path / "test" / "full-disk")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert result.returncode != 0 and 0 < len(steps) < 10
    assert (
        result.stderr.count("\nerror:") == 1
        and "could not be written with 0 MiB free" in result.stderr
        and "Traceback" not in result.stderr
    )
