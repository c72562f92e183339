"""Checkpoint folders exist whole or not at all, and nothing is read from a damaged one."""

import json

import pytest

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.errors import UserError


def write(run_dir, step, content=b"weights"):
    temporary = commit.begin(run_dir, step)
    (temporary / "shard").write_bytes(content)
    return temporary


def test_a_checkpoint_appears_when_it_is_committed(tmp_path):
    write(tmp_path, 5)
    assert commit.committed_steps(tmp_path) == []
    commit.commit(tmp_path, 5, {"train_state": {}})
    write(tmp_path, 10)  # interrupted
    assert commit.committed_steps(tmp_path) == [5]
    assert commit.newest(tmp_path) == commit.folder_of(tmp_path, 5)


def test_leftovers_of_an_interrupted_save_are_not_committed(tmp_path):
    (write(tmp_path, 5) / "stale").write_bytes(b"old")
    write(tmp_path, 5)
    commit.commit(tmp_path, 5, {})
    assert set(commit.read_meta(commit.folder_of(tmp_path, 5))["files"]) == {"shard"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path, 5)
    commit.commit(tmp_path, 5, {})
    shard = commit.folder_of(tmp_path, 5) / "shard"
    assert commit.read_meta(shard.parent)
    {"flip": lambda: shard.write_bytes(b"weighty"), "truncate": lambda: shard.write_bytes(b"wei"), "remove": shard.unlink}[damage]()
    with pytest.raises(UserError, match=str(shard)):
        commit.read_meta(shard.parent)


def test_a_run_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        commit.newest(tmp_path)


def test_fingerprints_tell_contents_apart(tmp_path):
    prints = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        write(tmp_path / name, 1, content)
        commit.commit(tmp_path / name, 1, {})
        prints.append(commit.fingerprint(commit.folder_of(tmp_path / name, 1)))
    assert prints[0] == prints[1] != prints[2]


def test_a_train_state_checks_itself():
    state = TrainState(3, 24, 1.5)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    for broken in ({"step": 1}, {**state.to_dict(), "extra": 1}, {**state.to_dict(), "step": -1}):
        with pytest.raises(ValueError):
            TrainState.from_dict(broken)
