"""Test that checkpoints are committed atomically and that damaged ones are refused."""

import json
from pathlib import Path

import pytest

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.state import TrainState, newest_state
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.digest import sha256


def begin_checkpoint(run_dir, step, content=b"weights"):
    temporary = commit.begin(run_dir, step)
    (temporary / "shard").write_bytes(content)
    return temporary


def test_a_checkpoint_is_visible_only_after_its_commit(tmp_path):
    begin_checkpoint(tmp_path, 5)
    assert commit.committed_steps(tmp_path) == []
    commit.commit(tmp_path, 5, {"train_state": {}})
    begin_checkpoint(tmp_path, 10)  # interrupted
    assert commit.committed_steps(tmp_path) == [5]
    assert commit.newest(tmp_path) == commit.folder_of(tmp_path, 5)


def test_leftovers_of_an_interrupted_save_are_not_committed(tmp_path):
    (begin_checkpoint(tmp_path, 5) / "stale").write_bytes(b"old")
    begin_checkpoint(tmp_path, 5)
    commit.commit(tmp_path, 5, {})
    assert set(commit.read_meta(commit.folder_of(tmp_path, 5))["files"]) == {"shard"}


@pytest.mark.parametrize(
    "stray",
    [
        Path.touch,
        Path.mkdir,
        lambda path: path.symlink_to("nowhere"),
        lambda path: (path / "notes").mkdir(parents=True),
        lambda path: (path.mkdir(), (path / ".nfs0000000000000001").touch()),
    ],
)
def test_what_only_has_the_name_of_a_checkpoint_is_passed_over_with_one_line(
    tmp_path, stray, capsys
):
    begin_checkpoint(tmp_path, 5)
    commit.commit(tmp_path, 5, {})
    names = ["step-00000010", "step-000000005", "step-00000011.tmp"]
    for path in (tmp_path / "checkpoints" / name for name in names):
        stray(path)
    for _ in range(2):
        assert commit.committed_steps(tmp_path) == [5]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("is no checkpoint" in line for line in warnings)
    for step in (10, 11):
        begin_checkpoint(tmp_path, step)
        commit.commit(tmp_path, step, {})
    assert commit.committed_steps(tmp_path) == [5, 10, 11]


def test_a_checkpoint_that_lost_its_meta_json_is_not_passed_over(tmp_path):
    folder = commit.begin(tmp_path, 5)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    commit.commit(tmp_path, 5, {})
    (commit.folder_of(tmp_path, 5) / "meta.json").unlink()
    with pytest.raises(UserError, match="step-00000005 is no committed checkpoint"):
        commit.read_meta(commit.newest(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(tmp_path, damage):
    begin_checkpoint(tmp_path, 5)
    commit.commit(tmp_path, 5, {})
    shard = commit.folder_of(tmp_path, 5) / "shard"
    assert commit.read_meta(shard.parent)
    {
        "flip": lambda: shard.write_bytes(b"weighty"),
        "truncate": lambda: shard.write_bytes(b"wei"),
        "remove": shard.unlink,
    }[damage]()
    with pytest.raises(UserError, match=str(shard)):
        commit.read_meta(shard.parent)


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        commit.newest(tmp_path)


def test_fingerprints_differ_if_and_only_if_contents_differ(tmp_path):
    fingerprints = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        begin_checkpoint(tmp_path / name, 1, content)
        commit.commit(tmp_path / name, 1, {})
        fingerprints.append(commit.fingerprint(commit.folder_of(tmp_path / name, 1)))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_an_invalid_train_state_is_refused():
    state = TrainState(3, 24, 1.5)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    for broken in ({"step": 1}, {**state.to_dict(), "extra": 1}, {**state.to_dict(), "step": -1}):
        with pytest.raises(ValueError):
            TrainState.from_dict(broken)


def committed(run_dir, step=5, **meta):
    """Commit a checkpoint with a train state, as a run does, and return its folder."""
    (begin_checkpoint(run_dir, step) / ".metadata").write_bytes(b"torch's")
    state = TrainState(step, 8 * step, 1.5, [2.25, 1e-300]).to_dict()
    commit.commit(run_dir, step, {"train_state": state, "config": {"betas": (0.9, 0.95)}} | meta)
    return commit.folder_of(run_dir, step)


def rewrite(folder, change) -> None:
    """Change meta.json without updating its hash, as an edit by hand does."""
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


EDITS = {
    "step": lambda meta: meta["train_state"].update(step=4),
    "consumed samples": lambda meta: meta["train_state"].update(consumed_samples=8),
    "a loss": lambda meta: meta["train_state"]["recent_losses"].append(1.0),
    "no files": lambda meta: meta["files"].clear(),
    "one file removed": lambda meta: meta["files"].pop("shard"),
    "another hash": lambda meta: meta["files"].update(shard="0" * 64),
    "files is null": lambda meta: meta.update(files=None),
    "config": lambda meta: meta["config"].update(betas=[0.9, 0.99]),
    "source of an import": lambda meta: meta.update(imported="0" * 64),
    "a key added": lambda meta: meta.update(note="mine"),
    "the hash itself": lambda meta: meta.update(sha256="0" * 64),
    "the hash is null": lambda meta: meta.update(sha256=None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_meta_json_is_refused_by_every_reader(tmp_path, edit):
    folder = committed(tmp_path)
    assert list(json.loads((folder / "meta.json").read_text()))[-1] == "sha256"
    assert commit.read_meta(folder) == commit.sealed_meta(folder)
    rewrite(folder, EDITS[edit])
    readers = (
        commit.read_meta,
        commit.sealed_meta,
        commit.fingerprint,
        lambda _: newest_state(tmp_path),
    )
    for read in readers:
        with pytest.raises(
            UserError, match=r"meta.json was changed after it was written, or is damaged"
        ):
            read(folder)


def test_a_malformed_meta_json_is_refused_by_every_reader(tmp_path):
    folder = committed(tmp_path)
    whole = (folder / "meta.json").read_bytes()
    broken = (
        whole[: len(whole) // 2],
        b"",
        b"\xef\xbb\xbf" + whole,
        b"\xff\xfe" + whole,
        b"[]",
        b"null",
        whole + b"}",
    )
    for content in broken:
        (folder / "meta.json").write_bytes(content)
        for read in (
            commit.read_meta,
            commit.sealed_meta,
            commit.fingerprint,
            lambda _: newest_state(tmp_path),
        ):
            with pytest.raises(
                UserError, match=r"meta.json was changed after it was written, or is damaged"
            ):
                read(folder)


def test_key_order_and_whitespace_do_not_change_the_fingerprint(tmp_path):
    folder = committed(tmp_path)
    files = commit.read_meta(folder)["files"]
    fingerprint = commit.fingerprint(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(dict(reversed(meta.items()))))
    assert commit.read_meta(folder)["files"] == files
    assert commit.fingerprint(folder) == fingerprint
    # The last of two equal keys counts, both for the hash and for the reader.
    text = json.dumps(meta)
    (folder / "meta.json").write_text('{"files": {}, ' + text[1:])
    assert commit.read_meta(folder)["files"] == files
    (folder / "meta.json").write_text(text[:-1] + ', "files": {}}')
    with pytest.raises(UserError, match="meta.json was changed"):
        commit.read_meta(folder)


def unsealed(run_dir, change=lambda meta: None):
    """Commit a checkpoint whose meta.json has no hash of itself, as older versions wrote it."""
    folder = committed(run_dir)
    rewrite(folder, lambda meta: (meta.pop("sha256"), change(meta)))
    return folder


def test_a_checkpoint_without_a_hash_is_read_with_one_warning(tmp_path, capfd):
    folder = unsealed(tmp_path)
    assert commit.fingerprint(folder) == sha256(folder / "meta.json")
    assert capfd.readouterr().err == ""
    assert newest_state(tmp_path).consumed_samples == 40
    for _ in range(2):
        commit.read_meta(folder)
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith(f"warning: {folder / 'meta.json'} has no hash of itself")


def test_imported_weights_without_a_hash_keep_their_fingerprint(tmp_path):
    assert (
        commit.fingerprint(unsealed(tmp_path, lambda meta: meta.update(imported="7" * 64)))
        == "7" * 64
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["files"].clear(), "it lists no files"),
        (lambda meta: meta["files"].pop(".metadata"), r"\.metadata is not among the files"),
        (lambda meta: meta["train_state"].update(step=4), "rename it to step-00000004"),
        (lambda meta: meta["files"].update(shard="0"), "shard is missing or damaged"),
    ],
)
def test_an_inconsistent_checkpoint_without_a_hash_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        commit.read_meta(unsealed(tmp_path, change))


@pytest.mark.parametrize(
    "state", [None, [], {"step": 5}, TrainState(5, -1).to_dict(), TrainState(5, "40").to_dict()]
)
def test_an_impossible_train_state_is_reported_as_damage(tmp_path, state):
    unsealed(tmp_path, lambda meta: meta.update(train_state=state))
    with pytest.raises(
        UserError, match=r"step-00000005/meta.json is damaged, or of another version"
    ):
        newest_state(tmp_path)


def test_an_unlisted_pickle_and_a_renamed_folder_are_refused(tmp_path):
    folder = committed(tmp_path)
    (folder / ".DS_Store").touch()
    assert commit.read_meta(folder)
    (folder / "common.pt").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"common.pt is not among the files"):
        commit.read_meta(folder)
    (folder / "common.pt").unlink()
    later = folder.rename(commit.folder_of(tmp_path, 10))
    with pytest.raises(UserError, match="checkpoint after step 5.*rename it to step-00000005"):
        commit.read_meta(later)
