"""Test from which checkpoint a run started, whatever happens to the run of that checkpoint."""

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
    """Commit a checkpoint that contains nothing but its own metadata."""
    (commit.begin(run_dir, step) / "shard").write_text(f"weights after {step}")
    fingerprints = {"base": base} if base else {}
    meta = {"config": {"init_from": init_from}, "fingerprints": fingerprints}
    commit.commit(run_dir, step, {"train_state": {"step": step}} | meta)


def run_of(folder: Path, init_from: str | Path | None, *changes: str, name: str = "lora") -> Config:
    begins = [f"init_from={init_from}"] if init_from else []
    return load_config(overrides(folder, name, "model=tiny", *begins, *changes))


def begun(config: Config, fingerprint: str | None = None) -> Config:
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
def first(base) -> Base:
    """Return its checkpoint after step 5."""
    return Base(base, 5, commit.fingerprint(commit.folder_of(base, 5)))


def test_a_run_begins_from_the_newest_and_keeps_it_while_the_base_trains_on(tmp_path, base):
    config = run_of(tmp_path, base)
    assert base_of(config).step == 10
    begun(config)
    newest = Base(base, 10, commit.fingerprint(commit.folder_of(base, 10)))
    assert read_record(config.run_dir) == newest
    checkpoint(base, 15)
    assert base_of(config) == newest


def test_what_was_chosen_holds_before_it_is_recorded(tmp_path, base, first):
    # Between the checks of a start and its first line the base may go on.
    config = run_of(tmp_path, base)
    assert base_of(config, first.fingerprint) == first
    begun(config, first.fingerprint)
    assert read_record(config.run_dir) == base_of(config) == first


def test_an_older_step_is_asked_for_by_number(tmp_path, base, first):
    config = begun(run_of(tmp_path, f"{base}@5"))
    assert base_of(config) == first == read_record(config.run_dir)
    assert base_of(run_of(tmp_path, base)) == first
    with pytest.raises(UserError, match=rf"lora began from {base} after step 5: leave out @10"):
        base_of(run_of(tmp_path, f"{base}@10"))
    with pytest.raises(UserError, match=rf"{base} has no checkpoint after step 7.* steps 5, 10$"):
        base_of(run_of(tmp_path, f"{base}@7", name="another"))


def test_a_plan_says_that_the_step_is_not_here(tmp_path, base):
    (base / "config.json").write_text(run_of(tmp_path, None).to_json())
    asked = run_of(tmp_path, f"{base}@7")
    assert not_here(asked) == [
        f"base's checkpoint not here: `train` needs init_from={base}@7 (it has: 5, 10)"
    ]
    assert not_here(run_of(tmp_path, f"{base}@5")) == [] == not_here(run_of(tmp_path, base))


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_base_that_is_gone_or_changed_is_named(tmp_path, base, first, is_gone):
    config = begun(run_of(tmp_path, f"{base}@5"))
    checkpoint(config.run_dir, 3, first.fingerprint, str(base))
    if is_gone:
        shutil.rmtree(first.folder)
    else:
        (commit.begin(base, 5) / "shard").write_text("trained again")
        commit.commit(base, 5, {})
    what = "is gone" if is_gone else "was changed since"
    said = rf"began from {base} after step 5, and that checkpoint, {first.folder}, {what}: restore"
    with pytest.raises(UserError, match=f"^{config.run_dir} {said}"):
        base_of(config)
    saved = commit.folder_of(config.run_dir, 3)
    with pytest.raises(UserError, match=f"^{saved} {said}"):
        base_of_checkpoint(saved, commit.sealed_meta(saved))


def test_a_meta_of_another_hash_is_a_change(tmp_path, base, first):
    config = begun(run_of(tmp_path, f"{base}@5"))
    path = first.folder / commit.META
    path.write_text(path.read_text().replace("init_from", "from"))
    with pytest.raises(UserError, match="was changed since"):
        base_of(config)


def test_damaged_weights_of_a_base_are_not_to_be_removed(first):
    (first.folder / "shard").write_text("other weights")
    with pytest.raises(UserError, match=f"{first.folder}/shard is .*damaged: restore") as refusal:
        first.read_meta()
    assert "checkpoint before it" not in str(refusal.value)


def test_a_base_that_was_moved_is_found_where_init_from_leads(tmp_path, base, first):
    config = begun(run_of(tmp_path, f"{base}@5"))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is gone"):
        base_of(config)
    config = begun(run_of(tmp_path, moved))
    assert base_of(config).folder == commit.folder_of(moved, 5)
    assert read_record(config.run_dir).path == moved


def test_another_init_from_is_refused_by_name(tmp_path, base):
    begun(run_of(tmp_path, f"{base}@5"))
    checkpoint(other := tmp_path / "other", 5, "of another run")
    typo = tmp_path / "typo"
    for init_from, what in ((other, "is another checkpoint"), (typo, "does not exist")):
        with pytest.raises(UserError) as refusal:
            base_of(run_of(tmp_path, init_from))
        folder = commit.folder_of(init_from, 5)
        assert f"init_from={init_from}: " in str(refusal.value)
        assert f"began from {base} after step 5, but {folder} {what}" in str(refusal.value)
        assert f"or init_from={base};" in str(refusal.value)


def test_a_relative_path_that_leads_nowhere_from_here_is_where_it_was(
    tmp_path, base, first, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = begun(run_of(tmp_path, "base@5"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert base_of(config) == first
    assert base_of(load_run(config.run_dir, [])) == first
    # The shape of the model is known from the run's own config.
    asked = overrides(tmp_path, "lora", "init_from=base")
    assert base_of(load_config(asked)) == first
    (elsewhere / "base").mkdir()
    with pytest.raises(UserError, match=f"^init_from=base@5: .* but {elsewhere}.* does not exist"):
        base_of(config)


def test_an_older_run_has_the_base_of_its_newest_checkpoint(tmp_path, base, first):
    config = run_of(tmp_path, base)
    run_folder.start_or_resume(config, 0)
    assert base_of(config).step == 10  # without a checkpoint nothing tells
    checkpoint(config.run_dir, 3, first.fingerprint, str(base))
    saved = commit.folder_of(config.run_dir, 3)
    assert base_of(config) == first == base_of_checkpoint(saved, commit.sealed_meta(saved))
    (commit.folder_of(base, 10) / commit.META).write_text("damaged, and nobody's base")
    assert base_of(config) == first
    assert base_of(begun(config)) == first == read_record(config.run_dir)
    (config.run_dir / RECORD).unlink()
    shutil.rmtree(first.folder)
    with pytest.raises(UserError, match=rf"lora began from .* {first.fingerprint}, .*steps 10\)"):
        base_of(config)


def test_a_branch_has_its_trunks_base(tmp_path, base, first):
    trunk = begun(run_of(tmp_path, f"{base}@5", name="trunk"))
    branch = run_of(tmp_path, base, f"branch_of={trunk.run_dir}", name="branch")
    assert base_of(branch) == first
    (trunk.run_dir / RECORD).unlink()  # of before
    checkpoint(trunk.run_dir, 3, first.fingerprint, str(base))
    assert base_of(branch) == first
    begun(branch)
    shutil.rmtree(trunk.run_dir)
    assert base_of(branch) == first


def test_a_branchs_start_is_found_where_its_base_was_moved_to(tmp_path, base):
    from retemper.pipeline.runs.eval_folder import start_of

    trunk = begun(run_of(tmp_path, f"{base}@5", name="trunk"))
    branch = begun(run_of(tmp_path, base, f"branch_of={trunk.run_dir}", name="branch"))
    moved = base.rename(tmp_path / "moved")
    start = start_of(load_run(branch.run_dir, [f"init_from={moved}"], ("init_from",)))
    assert start.run_dir == trunk.run_dir
    assert base_of(start).folder == commit.folder_of(moved, 5)


def test_a_checkpoint_finds_its_base_after_either_was_moved(tmp_path, monkeypatch):
    study = tmp_path / "study"
    checkpoint(study / "base", 5)
    monkeypatch.chdir(study)
    fingerprint = commit.fingerprint(commit.folder_of(study / "base", 5))
    config = begun(run_of(study, "base"))
    checkpoint(config.run_dir, 3, fingerprint, "base")

    def found(run_dir: Path) -> Path:
        folder = commit.folder_of(run_dir, 3)
        return base_of_checkpoint(folder, commit.sealed_meta(folder)).path

    monkeypatch.chdir(tmp_path)
    assert found(config.run_dir) == study / "base"
    study.rename(moved := tmp_path / "moved")
    with pytest.raises(UserError, match=f"began from {study / 'base'} after step 5.* is gone"):
        found(moved / "runs" / "test" / "lora")
    monkeypatch.chdir(moved)
    assert found(moved / "runs" / "test" / "lora") == moved / "base"


@pytest.mark.parametrize("begins_with_base", [True, False])
def test_a_run_begins_with_a_base_or_without_and_so_it_stays(tmp_path, base, begins_with_base):
    with_base = run_of(tmp_path, base)
    without = run_of(tmp_path, None)
    before, now = (with_base, without) if begins_with_base else (without, with_base)
    begun(before)
    assert (before.run_dir / RECORD).exists() == begins_with_base
    run_folder.check_resumable(before)
    with pytest.raises(UserError, match="another config:\n  - init_from: "):
        run_folder.check_resumable(now)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"path": 1, "step": 5, "fingerprint": ""}'])
def test_a_damaged_record_is_named(tmp_path, base, text):
    config = begun(run_of(tmp_path, base))
    (config.run_dir / RECORD).write_text(text)
    with pytest.raises(UserError, match=f"^{config.run_dir / RECORD} is damaged"):
        base_of(config)


def test_a_base_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^init_from={tmp_path / 'typo'}: .* has no checkpoint: "):
        base_of(run_of(tmp_path, tmp_path / "typo"))


def test_the_record_is_plain(tmp_path, base, first):
    config = begun(run_of(tmp_path, f"{base}@5"))
    values = {"path": str(base), "step": 5, "fingerprint": first.fingerprint}
    assert json.loads((config.run_dir / RECORD).read_text()) == values


@pytest.mark.filterwarnings("ignore")  # of megatron-core's imports
def test_a_run_says_first_what_it_begins_from(tmp_path, base, first, capsys):
    from types import SimpleNamespace

    from retemper.pipeline.train.branches import _introduce

    rank = SimpleNamespace(rank=0)
    _introduce(run_of(tmp_path, base), rank, {"base": first.fingerprint})
    assert capsys.readouterr().out.startswith(f"test/lora: begins from {base} after step 5\n")
