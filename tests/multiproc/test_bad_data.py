"""Test real ranks with a corrupt shard in the middle of a run, and with other data on a restart.

What they leave behind on the machine is checked, too.
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import data_config, overrides, run_command
from shared_memory import abandoned

from retemper.pipeline.checkpoint.commit import META, folder_of
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.ledger import read_ledger
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.files.jsonl import read_lines
from retemper.pipeline.runs import run_folder
from retemper.tokenize import job_folder
from retemper.tokenize.job import tokenize


@pytest.fixture(scope="module")
def shards(workspace) -> Path:
    """Return a corpus of several shards, of which the first step reads only some."""
    import email

    path = workspace / "data" / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_folder, "_BUCKET_BYTES", 25_000)
        source = {"kind": "text", "path": str(Path(email.__file__).parent), "glob": "**/*.py"}
        tokenize(
            data_config(workspace, "shards", path=str(path), source=source, tasks=1), progress=False
        )
    return path


def command(workspace, name: str, path: Path, *changes: str) -> list[str]:
    return overrides(
        workspace,
        name,
        f"data.path={path}",
        "data.name=shards",
        "parallel=tp2",
        "data.ledger=true",
        *changes,
    )


def damaged_copy(shards: Path, copy: Path, workspace) -> tuple[Path, list[int]]:
    """Copy `shards` with one flipped bit in a shard that ten steps read, but not the first step.

    Returns:
        That shard, and the ids of its samples.
    """
    shutil.copytree(shards, copy)
    config = load_config(command(workspace, "x", copy))
    streams = Streams(config)
    (opened,) = streams.shards.values()
    first = set(opened.shards_of(streams.order.batch(0, 8)).tolist())
    later = set(opened.shards_of(streams.order.batch(8, 72)).tolist())
    number = min(later - first)
    victim = sorted((copy / "train").rglob("*.mds"))[number]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    return victim, np.flatnonzero(opened.shards_of(np.arange(len(opened))) == number).tolist()


def test_a_damaged_shard_ends_the_run_or_is_skipped_on_request(workspace, shards, tmp_path, capsys):
    victim, bad = damaged_copy(shards, tmp_path / "copy", workspace)
    before = abandoned()
    started = time.monotonic()
    result = run_command(["train", *command(workspace, "bad", tmp_path / "copy")])
    assert (
        result.returncode != 0
        and f"{victim} is missing or damaged" in result.stderr
        and "or skip its samples with data.bad_shards=skip" in result.stderr
        and "Traceback" not in result.stderr
    )
    print(f"\nended after {time.monotonic() - started:.0f} s, start included")
    result = run_command(
        ["train", *command(workspace, "skips", tmp_path / "copy", "data.bad_shards=skip")]
    )
    assert result.returncode == 0 and f"skips a shard: {victim}" in result.stderr, result.stderr[
        -3000:
    ]
    run = workspace / "runs" / "test" / "skips"
    (note,) = run_folder.rank_files(run, run_folder.SKIPPED)
    skipped = list(read_lines(note, dict))
    order = Streams(load_config(command(workspace, "skips", tmp_path / "copy"))).order
    expected = {
        step: sorted(set(order.batch((step - 1) * 8, 8).tolist()) & set(bad))
        for step in range(1, 11)
    }
    assert {line["step"]: sorted(line["ids"]) for line in skipped} == {
        step: ids for step, ids in expected.items() if ids
    }
    assert len(list(run_folder.read_metrics(run))) == 10
    assert main(["data", "verify", str(run)]) == 0
    assert (
        f"{sum(len(line['ids']) for line in skipped)} of them had no loss"
        in capsys.readouterr().out
    )
    assert abandoned() <= before, "nothing is left in shared memory"


@pytest.mark.slow
def test_other_data_on_a_restart_is_refused_with_the_difference_or_recorded(
    workspace, shards, capsys
):
    save = ["checkpoint.save_every_steps=5", "train.tokens=6K"]  # 11 steps
    assert run_command(["train", *command(workspace, "changes", shards, *save)]).returncode == 0
    run = workspace / "runs" / "test" / "changes"
    shutil.rmtree(folder_of(run, 11))
    replay = [f"data.replay.path={workspace / 'data' / 'math'}", "data.replay.fraction=0.25"]
    other = command(workspace, "changes", workspace / "data" / "code", *save)
    assert main(["train", *command(workspace, "changes", shards, *save, *replay)]) == 1
    said = capsys.readouterr().err
    assert "data.replay: null -> " in said and "data.allow_change=true" in said
    result = run_command(["train", *other])
    assert (
        result.returncode == 1
        and "data.streams.shards: " in result.stderr
        and "data.allow_change=true" in result.stderr
    ), result.stderr
    changed = command(workspace, "changes", shards, *save, *replay, "data.allow_change=true")
    result = run_command(["train", *changed])
    assert result.returncode == 0, result.stderr[-3000:]
    (change,) = json.loads((folder_of(run, 11) / META).read_text())["train_state"]["data_changes"]
    assert (change["step"], change["consumed_samples"]) == (
        10,
        80,
    ) and "data.streams.replay: null -> " in change["difference"][0]
    ledger = read_ledger(run)
    assert list(ledger) == list(range(1, 12))
    assert (ledger[11] == Streams(load_config(changed)).order.batch(0, 8)).all()
    assert main(["data", "verify", str(run)]) == 0
    assert "11 steps" in capsys.readouterr().out
