"""Test how a run records its base, the checkpoint that it started from, and finds it again."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import overrides

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import (
    RECORD,
    Base,
    base_of,
    base_of_checkpoint,
    read_record,
    record,
)
from retemper.pipeline.checkpoint.trunk import not_here
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.errors import UserError
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config


def checkpoint(run_dir: Path, step: int, base: str | None = None, init_from: str | None = None):
    """Commit a checkpoint that contains only its own metadata and a text in place of weights."""
    (commit.begin(run_dir, step) / "shard").write_text(f"weights after {step}")
    fingerprints = {"base": base} if base else {}
    meta = {"config": {"init_from": init_from}, "fingerprints": fingerprints}
    commit.commit(run_dir, step, {"train_state": {"step": step}} | meta)


def run_of(folder: Path, init_from: str | Path | None, *changes: str, name: str = "lora") -> Config:
    start = [f"init_from={init_from}"] if init_from else []
    return load_config(overrides(folder, name, "model=tiny", *start, *changes))


def started(config: Config, fingerprint: str | None = None) -> Config:
    """Start a run and record its base, and return its config."""
    run_folder.start_or_resume(config, 0)
    record(config, fingerprint)
    return config


@pytest.fixture
def base(tmp_path) -> Path:
    """Return the folder of a run with checkpoints after the steps 5 and 10."""
    folder = tmp_path / "base"
    for step in (5, 10):
        checkpoint(folder, step)
    return folder


@pytest.fixture
def base_step_5(base) -> Base:
    """Return the checkpoint of that run after step 5."""
    return Base(base, 5, commit.fingerprint(commit.folder_of(base, 5)))


def test_a_run_keeps_its_base_while_the_base_run_saves_newer_checkpoints(tmp_path, base):
    config = run_of(tmp_path, base)
    assert base_of(config).step == 10
    started(config)
    newest = Base(base, 10, commit.fingerprint(commit.folder_of(base, 10)))
    assert read_record(config.run_dir) == newest
    checkpoint(base, 15)
    assert base_of(config) == newest


def test_a_chosen_base_is_kept_before_it_is_recorded(tmp_path, base, base_step_5):
    # The base run may save another checkpoint after this run has checked and before it records.
    config = run_of(tmp_path, base)
    assert base_of(config, base_step_5.fingerprint) == base_step_5
    started(config, base_step_5.fingerprint)
    assert read_record(config.run_dir) == base_of(config) == base_step_5


def test_init_from_selects_an_older_checkpoint_by_its_step(tmp_path, base, base_step_5):
    config = started(run_of(tmp_path, f"{base}@5"))
    assert base_of(config) == base_step_5 == read_record(config.run_dir)
    assert base_of(run_of(tmp_path, base)) == base_step_5
    with pytest.raises(UserError, match=rf"lora began from {base} after step 5: leave out @10"):
        base_of(run_of(tmp_path, f"{base}@10"))
    with pytest.raises(UserError, match=rf"{base} has no checkpoint after step 7.* steps 5, 10$"):
        base_of(run_of(tmp_path, f"{base}@7", name="another"))


def test_a_plan_reports_a_missing_step_of_the_base(tmp_path, base):
    (base / "config.json").write_text(run_of(tmp_path, None).to_json())
    config = run_of(tmp_path, f"{base}@7")
    assert not_here(config) == [
        f"base's checkpoint not here: `train` needs init_from={base}@7 (it has: 5, 10)"
    ]
    assert not_here(run_of(tmp_path, f"{base}@5")) == [] == not_here(run_of(tmp_path, base))


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_removed_or_changed_base_is_reported(tmp_path, base, base_step_5, is_gone):
    config = started(run_of(tmp_path, f"{base}@5"))
    checkpoint(config.run_dir, 3, base_step_5.fingerprint, str(base))
    copy = shutil.copytree(base_step_5.folder, tmp_path / "copy")
    if is_gone:
        shutil.rmtree(base_step_5.folder)
    else:
        (commit.begin(base, 5) / "shard").write_text("trained again")
        commit.commit(base, 5, {})
    problem = "is gone" if is_gone else "was changed since"
    message = (
        rf"began from {base} after step 5, and that checkpoint, {base_step_5.folder}, "
        rf"{problem}: restore"
    )
    with pytest.raises(UserError, match=f"^{config.run_dir} {message}"):
        base_of(config)
    saved = commit.folder_of(config.run_dir, 3)
    with pytest.raises(UserError, match=f"^{saved} {message}"):
        base_of_checkpoint(saved, commit.sealed_meta(saved))
    shutil.copytree(copy, base_step_5.folder, dirs_exist_ok=True)
    assert base_of(config) == base_of_checkpoint(saved, commit.sealed_meta(saved)) == base_step_5


def test_an_edited_meta_json_counts_as_a_changed_base(tmp_path, base, base_step_5):
    config = started(run_of(tmp_path, f"{base}@5"))
    path = base_step_5.folder / commit.META
    path.write_text(path.read_text().replace("init_from", "from"))
    with pytest.raises(UserError, match="was changed since"):
        base_of(config)


def test_damaged_base_weights_are_reported_without_advice_to_remove_them(base_step_5):
    (base_step_5.folder / "shard").write_text("other weights")
    with pytest.raises(
        UserError, match=f"{base_step_5.folder}/shard is .*damaged: restore"
    ) as refusal:
        base_step_5.read_meta()
    assert "checkpoint before it" not in str(refusal.value)


def test_a_moved_base_is_found_by_the_new_init_from(tmp_path, base, base_step_5):
    config = started(run_of(tmp_path, f"{base}@5"))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is gone"):
        base_of(config)
    config = started(run_of(tmp_path, moved))
    assert base_of(config).folder == commit.folder_of(moved, 5)
    assert read_record(config.run_dir).path == moved


def test_a_different_init_from_is_refused(tmp_path, base):
    started(run_of(tmp_path, f"{base}@5"))
    checkpoint(other := tmp_path / "other", 5, "of another run")
    typo = tmp_path / "typo"
    for init_from, problem in ((other, "is another checkpoint"), (typo, "does not exist")):
        with pytest.raises(UserError) as refusal:
            base_of(run_of(tmp_path, init_from))
        folder = commit.folder_of(init_from, 5)
        assert f"init_from={init_from}: " in str(refusal.value)
        assert f"began from {base} after step 5, but {folder} {problem}" in str(refusal.value)
        assert f"or init_from={base};" in str(refusal.value)


def test_a_relative_init_from_that_does_not_exist_here_uses_the_recorded_base(
    tmp_path, base, base_step_5, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = started(run_of(tmp_path, "base@5"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert base_of(config) == base_step_5
    assert base_of(load_run(config.run_dir, [])) == base_step_5
    # The base is not needed for the shape of the model, which is in the run's own config.
    arguments = overrides(tmp_path, "lora", "init_from=base")
    assert base_of(load_config(arguments)) == base_step_5
    (elsewhere / "base").mkdir()
    with pytest.raises(UserError, match=f"^init_from=base@5: .* but {elsewhere}.* does not exist"):
        base_of(config)


def test_a_run_without_a_record_uses_the_base_of_its_newest_checkpoint(tmp_path, base, base_step_5):
    config = run_of(tmp_path, base)
    run_folder.start_or_resume(config, 0)
    assert base_of(config).step == 10  # no checkpoint of the run names another base
    checkpoint(config.run_dir, 3, base_step_5.fingerprint, str(base))
    saved = commit.folder_of(config.run_dir, 3)
    assert base_of(config) == base_step_5 == base_of_checkpoint(saved, commit.sealed_meta(saved))
    (commit.folder_of(base, 10) / commit.META).write_text("damaged, and nobody's base")
    assert base_of(config) == base_step_5
    assert base_of(started(config)) == base_step_5 == read_record(config.run_dir)
    (config.run_dir / RECORD).unlink()
    copy = shutil.move(base_step_5.folder, tmp_path / "copy")
    with pytest.raises(
        UserError, match=rf"lora began from .* {base_step_5.fingerprint}, .*steps 10\)"
    ):
        base_of(config)
    shutil.move(copy, base_step_5.folder)
    assert base_of(config) == base_step_5


def test_a_branch_has_the_base_of_its_trunk(tmp_path, base, base_step_5):
    trunk = started(run_of(tmp_path, f"{base}@5", name="trunk"))
    branch = run_of(tmp_path, base, f"branch_of={trunk.run_dir}", name="branch")
    assert base_of(branch) == base_step_5
    (trunk.run_dir / RECORD).unlink()  # as in a run from before records existed
    checkpoint(trunk.run_dir, 3, base_step_5.fingerprint, str(base))
    assert base_of(branch) == base_step_5
    started(branch)
    shutil.rmtree(trunk.run_dir)
    assert base_of(branch) == base_step_5


def test_the_start_of_a_branch_is_found_after_its_base_was_moved(tmp_path, base):
    from retemper.pipeline.runs.eval_folder import start_of

    trunk = started(run_of(tmp_path, f"{base}@5", name="trunk"))
    branch = started(run_of(tmp_path, base, f"branch_of={trunk.run_dir}", name="branch"))
    moved = base.rename(tmp_path / "moved")
    start = start_of(load_run(branch.run_dir, [f"init_from={moved}"], ("init_from",)))
    assert start.run_dir == trunk.run_dir
    assert base_of(start).folder == commit.folder_of(moved, 5)


def test_a_checkpoint_finds_its_base_after_the_study_was_moved(tmp_path, monkeypatch):
    study = tmp_path / "study"
    checkpoint(study / "base", 5)
    monkeypatch.chdir(study)
    fingerprint = commit.fingerprint(commit.folder_of(study / "base", 5))
    config = started(run_of(study, "base"))
    checkpoint(config.run_dir, 3, fingerprint, "base")

    def path_of_base(run_dir: Path) -> Path:
        folder = commit.folder_of(run_dir, 3)
        return base_of_checkpoint(folder, commit.sealed_meta(folder)).path

    monkeypatch.chdir(tmp_path)
    assert path_of_base(config.run_dir) == study / "base"
    study.rename(moved := tmp_path / "moved")
    with pytest.raises(UserError, match=f"began from {study / 'base'} after step 5.* is gone"):
        path_of_base(moved / "runs" / "test" / "lora")
    monkeypatch.chdir(moved)
    assert path_of_base(moved / "runs" / "test" / "lora") == moved / "base"


@pytest.mark.parametrize("starts_with_base", [True, False])
def test_a_started_run_can_neither_gain_nor_lose_a_base(tmp_path, base, starts_with_base):
    with_base = run_of(tmp_path, base)
    without = run_of(tmp_path, None)
    stored, changed = (with_base, without) if starts_with_base else (without, with_base)
    started(stored)
    assert (stored.run_dir / RECORD).exists() == starts_with_base
    run_folder.check_resumable(stored)
    with pytest.raises(UserError, match="another config:\n  - init_from: "):
        run_folder.check_resumable(changed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": 1, "step": 5, "fingerprint": ""}'])
def test_a_damaged_record_is_reported(tmp_path, base, text):
    config = started(run_of(tmp_path, base))
    (config.run_dir / RECORD).write_text(text)
    with pytest.raises(UserError, match=f"^{config.run_dir / RECORD} is damaged"):
        base_of(config)


def test_a_base_without_checkpoints_is_reported(tmp_path):
    with pytest.raises(UserError, match=f"^init_from={tmp_path / 'typo'}: .* has no checkpoint: "):
        base_of(run_of(tmp_path, tmp_path / "typo"))


def test_the_record_has_a_path_a_step_and_a_fingerprint(tmp_path, base, base_step_5):
    config = started(run_of(tmp_path, f"{base}@5"))
    values = {"path": str(base), "step": 5, "fingerprint": base_step_5.fingerprint}
    assert json.loads((config.run_dir / RECORD).read_text()) == values


@pytest.mark.filterwarnings("ignore")  # of megatron-core's imports
def test_a_run_prints_its_base_first(tmp_path, base, base_step_5, capsys):
    from types import SimpleNamespace

    from retemper.pipeline.train.branches import _introduce

    rank = SimpleNamespace(rank=0)
    _introduce(run_of(tmp_path, base), rank, {"base": base_step_5.fingerprint})
    assert capsys.readouterr().out.startswith(f"test/lora: begins from {base} after step 5\n")
