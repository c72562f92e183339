"""Checkpoints are read as data: what a file says is never called.

torch's `.metadata` is a pickle, and so is each object of a checkpoint that is no tensor. Their
hashes are in meta.json, which whoever changes them can change too.
"""

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from retemper.pipeline.errors import UserError

# What `.metadata` consists of, besides types of numbers: classes that only hold fields.
_CLASSES = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
}


@cache
def patch() -> None:
    """Limit what torch reads of checkpoints to tensors, plain values and their descriptions.

    The descriptions may be those of any version of torch.
    """
    filesystem.pickle = SimpleNamespace(**vars(pickle) | {"load": _load_metadata})
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # where torch asks for less, too
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses both at once
    # A pickle of them is a tuple, to which later versions of torch append.
    known = len(fields(TensorProperties))
    fill = TensorProperties.__setstate__
    TensorProperties.__setstate__ = lambda self, values: fill(self, values[:known])


def trust_extra_state(states: Iterable[torch.Tensor], folder: Path) -> None:
    """Let Transformer Engine unpickle its states of delayed scaling, which it refuses by default.

    Args:
        states: each a pickle as bytes; empty for a layer in another precision.
        folder: of their checkpoint, for the message.

    Raises:
        UserError: a state names what is no part of such states.
    """
    from megatron.core.safe_globals import SafeUnpickler

    for state in states:
        try:
            if content := state.cpu().numpy().tobytes():
                SafeUnpickler(io.BytesIO(content)).load()
        except Exception as error:  # a damaged pickle can raise any
            raise _refusal(folder, error) from None
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read a checkpoint with torch within this context.

    Raises:
        UserError: a file of it is not what retemper writes; the message names it or the folder.
    """
    try:
        yield
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise _refusal(folder, error) from None


def _refusal(path: str | Path, cause: BaseException) -> UserError:
    if isinstance(cause, CheckpointException):
        cause, _traceback = next(iter(cause.failures.values()))
    named = re.search(r"(?:GLOBAL |class ')(\w+\.[\w.]+)", str(cause))
    what = (
        f"names {named[1]}, which is no part of a checkpoint and could run code"
        if named and isinstance(cause, pickle.UnpicklingError)
        else f"cannot be read ({type(cause).__name__}: {cause})"
    )
    return UserError(
        f"{path} {what}: it was changed after it was written, or is damaged. Restore that "
        "checkpoint from a copy that you trust, or import that model again"
    )


def _load_metadata(file: IO[bytes]) -> Metadata:
    """Return the contents of a `.metadata` file, written by any version of torch.

    Raises:
        UserError: it names something else than the classes above, or is damaged.
    """
    try:
        metadata = _Unpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"it points to {info.relative_path}")
    except Exception as error:  # a damaged pickle can raise any
        raise _refusal(file.name, error) from None
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return _made_by(super().find_class(module, name))
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _made_by(named: Any) -> type:
    """Return a class for one load that makes what `named` makes.

    A pickle can set attributes of the classes that it gets: they are those of this one.
    """
    make = partial(named.__new__, named) if isinstance(named, type) else named
    return type("Made", (), {"__new__": lambda _class, *values: make(*values)})
