"""Checkpoint folders on disk.

They are written under a temporary name, committed by one rename, and verified before anything in
them is read.
"""

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, TypedDict

from retemper.pipeline.distributed.topology import is_main_process
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.digest import sha256
from retemper.pipeline.files.json_file import parse_json, with_other_keys
from retemper.pipeline.files.sealed import dump_sealed, is_intact

META = "meta.json"
_SEAL = "sha256"  # in meta.json: a hash of all its other keys
# The files that torch and megatron-core read.
_READ = re.compile(r"\.metadata|metadata\.json|.*\.(distcp|pt)")
IMPORTED = "imported"  # in meta.json of imported weights: a hash of what they were imported from


@with_other_keys
class _Meta(TypedDict, total=False):
    """What is read of meta.json; state.py checks the train state, the schema the config."""

    fingerprints: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, str]


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder that the checkpoint after `step` steps has once it is committed."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed_steps(run_dir: Path) -> list[int]:
    """Return the steps of all committed checkpoints in ascending order.

    What has such a name, but is a file, or a folder without any file of a checkpoint, is passed
    over with one line. A folder that lacks some of its files is among them, and refused when read.
    """
    folder = run_dir / "checkpoints"
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    strays = [path for path in named if not _is_checkpoint(path)]
    for path in strays:
        _tell_of_stray(path)
    return sorted(int(path.name[5:]) for path in named if path not in strays)


def _is_checkpoint(path: Path) -> bool:
    return (
        path.is_dir()
        and path.name == folder_of(Path(), int(path.name[5:])).name
        and any(each.name == META or _READ.fullmatch(each.name) for each in path.iterdir())
    )


@functools.cache
def _tell_of_stray(path: Path) -> None:
    if is_main_process():
        print(f"warning: {path} is no checkpoint and is passed over", file=sys.stderr, flush=True)


def newest(run_dir: Path) -> Path:
    """Return the folder of the newest committed checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    steps = committed_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint: train that run first, or correct the path")
    return folder_of(run_dir, steps[-1])


def begin(run_dir: Path, step: int) -> Path:
    """Create and return an empty temporary folder for a checkpoint.

    Leftovers of an interrupted save are removed.
    """
    temporary = folder_of(run_dir, step).with_suffix(".tmp")
    _remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def commit(run_dir: Path, step: int, meta: dict) -> None:
    """Hash every file, write meta.json last, and rename the temporary folder to its final name.

    A checkpoint therefore exists completely or not at all.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint.
        meta: contents of meta.json; hashes of the files and, as the last key, a hash of all other
            keys are added.
    """
    target = folder_of(run_dir, step)
    temporary = target.with_suffix(".tmp")
    meta = {**meta, "files": {path.name: sha256(path) for path in sorted(temporary.iterdir())}}
    as_json = json.loads(json.dumps(meta))  # JSON turns tuples into lists, and keys into strings
    with open(temporary / META, "w") as file:
        file.write(dump_sealed(as_json))
        file.flush()
        os.fsync(file.fileno())
    _remove(target)
    temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_meta(folder: Path, advice: str | None = None) -> dict:
    """Return meta.json of a committed checkpoint, after checking its hash and that of every file.

    The hashes find damage. They do not find intent: who changes a file can change its hash, too,
    and what torch reads of it is limited by compat/safe_pickles.py.

    Args:
        folder: of the checkpoint.
        advice: for the message where a file is damaged; the default suits a run that can continue
            from an earlier checkpoint.

    Raises:
        UserError: a file is missing, damaged or not listed; the message names it.
    """
    advice = advice or (
        f"restore {folder} from a copy, or remove it to go on from the checkpoint before it"
    )
    meta = sealed_meta(folder)
    for name, expected in meta["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is missing or damaged: {advice}")
    readable = {path.name for path in folder.iterdir() if _READ.fullmatch(path.name)}
    if unlisted := sorted(readable - meta["files"].keys()):
        raise UserError(
            f"{folder / unlisted[0]} is not among the files that {folder / META} lists: {advice}"
        )
    return meta


def sealed_meta(folder: Path) -> dict:
    """Return meta.json of a committed checkpoint, after checking its own hash.

    The hashes of the other files are not checked.
    A checkpoint written before meta.json had a hash is read with a warning, once per process.

    Raises:
        UserError: meta.json is missing or was changed, or the folder has another step's name.
    """
    meta = _parsed(folder)
    if _SEAL not in meta:
        _warn_of_no_seal(folder)
    elif not is_intact(meta):
        raise _changed(folder, "its contents are not those that it holds a hash of")
    if not meta.get("files"):
        raise _changed(folder, "it lists no files")
    state = meta.get("train_state")
    step = state.get("step") if isinstance(state, dict) else None
    if (
        isinstance(step, int)
        and folder.name.startswith("step-")
        and folder.name != folder_of(Path(), step).name
    ):
        raise UserError(
            f"according to its {META}, {folder} is the checkpoint after step {step}: it was "
            "renamed or changed. "
            f"If it is that one, rename it to {folder_of(Path(), step).name}; else remove it"
        )
    return {key: value for key, value in meta.items() if key != _SEAL}


def fingerprint(folder: Path) -> str:
    """Return one hash over all files of a committed checkpoint.

    For imported weights it is a hash of what they were imported from, the same at any layout.
    Otherwise it is the hash in meta.json; in older checkpoints without one, the hash of meta.json.

    Raises:
        UserError: meta.json is missing or was changed.
    """
    meta = _parsed(folder)
    if _SEAL in meta and not is_intact(meta):
        raise _changed(folder, "its contents are not those that it holds a hash of")
    return meta.get(IMPORTED) or meta.get(_SEAL) or sha256(folder / META)


def _parsed(folder: Path) -> dict:
    path = folder / META
    try:
        return parse_json(path.read_bytes(), _Meta)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no committed checkpoint: {META} is missing") from None
    except ValueError as error:
        raise _changed(folder, str(error)) from None


def _changed(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder / META} was changed after it was written, or is damaged ({reason}): "
        f"restore it from a copy, or remove {folder} to go on from the checkpoint before it"
    )


@functools.cache
def _warn_of_no_seal(folder: Path) -> None:
    print(
        f"warning: {folder / META} has no hash of itself "
        "(an older version wrote it, or it was changed since): the checkpoint's files are checked, "
        "but meta.json itself is not",
        file=sys.stderr,
        flush=True,
    )
