"""Test that a checkpoint is read as data: nothing that a file of it names is called."""

import builtins
import copyreg
import functools
import importlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties

from retemper.pipeline.compat.safe_pickles import patch, reading, trust_extra_state
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.errors import UserError

MODULE = "torch.distributed.checkpoint.metadata"
PROPERTIES = f"c{MODULE}\nTensorProperties\n"


@pytest.fixture(scope="module", autouse=True)
def patched():
    prepare_megatron()


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint that an earlier commit wrote."""
    with tarfile.open(ROOT / "tests" / "old_run" / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "runs" / "old" / "full" / "checkpoints" / "step-00000004"


class Call:
    """What unpickles as the result of a call."""

    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


def tensor_of(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def touch(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


ATTACKS = {
    "a command": touch,
    "a command in a field": lambda ran: Metadata({}, planner_data=touch(ran), storage_data={}),
    "a command of protocol 0": lambda ran: f"cposix\nsystem\n(Vtouch {ran}\ntR.".encode(),
    "a function by way of an allowed module": lambda ran: (
        f"\x80\x04V{MODULE}\nVos.system\n\x93(Vtouch {ran}\ntR.".encode("latin1")
    ),
    "an instance of protocol 0": lambda ran: f"(Vtouch {ran}\niposix\nsystem\n.".encode(),
    "eval": lambda ran: Call(builtins.eval, f"open({str(ran)!r}, 'w')"),
    "getattr": lambda ran: Call(builtins.getattr, StorageMeta, "__init__"),
    "an import": lambda ran: Call(importlib.import_module, "antigravity"),
    "functools.partial": lambda ran: Call(functools.partial, print),
    "copyreg": lambda ran: Call(copyreg._reconstructor, StorageMeta, object, None),
    "a tensor that holds a command": lambda ran: Call(
        torch.storage._load_from_bytes, tensor_of(touch(ran))
    ),
    "an argument of an allowed class": lambda ran: Call(torch.Size, touch(ran)),
    "an attribute of an allowed class": lambda ran: (
        f"{PROPERTIES}N(V__setstate__\ncposix\nsystem\nd\x86b.".encode("latin1")
    ),
    "a persistent object": lambda ran: b"P0\n.",
    "half of a pickle": lambda ran: pickle.dumps(Metadata({}, storage_data={}))[:-20],
    "a number as class": lambda ran: b"K\x01)\x81.",
    "numbers as name": lambda ran: b"\x80\x04K\x01K\x02\x93.",
    "a number as path": lambda ran: Metadata({}, storage_data={0: _StorageInfo(7, 0, 0)}),
    "a list": lambda ran: [],
    "nothing": lambda ran: b"",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_planted_metadata_is_refused_by_name_and_nothing_of_it_runs(tmp_path, attack):
    planted = ATTACKS[attack](tmp_path / "ran")
    (tmp_path / ".metadata").write_bytes(
        planted if isinstance(planted, bytes) else pickle.dumps(planted)
    )
    message = rf"{tmp_path}/\.metadata (names \w+\.|cannot be read).*Restore"
    with pytest.raises(UserError, match=message):
        FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_a_class_of_torch(tmp_path):
    changed = f"{PROPERTIES}N(V__setstate__\nctorch\nSize\nd\x86b."
    (tmp_path / ".metadata").write_bytes(changed.encode("latin1"))
    before = TensorProperties.__setstate__
    with pytest.raises(UserError, match="has no attribute 'storage_data'"):
        FileSystemReader(tmp_path).read_metadata()
    assert TensorProperties.__setstate__ is before


def test_a_file_outside_the_folder_is_not_read(tmp_path, folder):
    metadata = FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="points to ../../secret"):
        FileSystemReader(tmp_path).read_metadata()


@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_metadata_of_every_torch_is_read(folder, monkeypatch, count):
    """Each version pickles the properties of a tensor as a tuple, to which it may append."""
    state = TensorProperties.__getstate__
    with monkeypatch.context() as other:
        other.setattr(
            TensorProperties, "__getstate__", lambda self: (*state(self), None, None)[:count]
        )
        written = pickle.dumps(FileSystemReader(folder).read_metadata())
    (folder / ".metadata").write_bytes(written)
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert found["embedding.word_embeddings.weight"].properties.dtype == torch.float32


def test_an_object_of_a_checkpoint_is_no_code(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    patch.cache_clear()
    patch()
    key = "common_state/shard_0_1"
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    planted = tensor_of([touch(tmp_path / "ran")])
    (folder / place.relative_path).write_bytes(planted)
    place.offset, place.length = 0, len(planted)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"{folder} names posix.system"), reading(folder):
        load({key: io.BytesIO()}, storage_reader=FileSystemReader(folder), no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_a_scaling_state_is_read_only_if_it_is_one(tmp_path, monkeypatch):
    """Transformer Engine pickles its states into tensors of bytes."""
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    for planted in (touch(tmp_path / "ran"), ATTACKS["a tensor that holds a command"](tmp_path)):
        state = torch.frombuffer(bytearray(pickle.dumps({"scale": planted})), dtype=torch.uint8)
        with pytest.raises(UserError, match=rf"{tmp_path} names posix.system"):
            trust_extra_state([torch.empty(0), state], tmp_path)
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
    assert not (tmp_path / "ran").exists()
    state = pickle.dumps({"amax_history_fwd": torch.ones(4, 3), "extra_fp8_variables": {"a": 1}})
    trust_extra_state([torch.frombuffer(bytearray(state), dtype=torch.uint8)], tmp_path)
    assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
