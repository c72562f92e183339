"""Checkpoint folders on disk: written under a temporary name, committed by one rename, verified before anything in them is read."""

import functools
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.sealed import is_intact, seal

META = "meta.json"
_SEAL = "sha256"  # in meta.json: a hash of all else in it
_READ = re.compile(r"\.metadata|metadata\.json|.*\.(distcp|pt)")  # by torch and megatron-core
IMPORTED = "imported"  # in meta.json of imported weights: a hash of what they were imported from


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands once it is committed."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed_steps(run_dir: Path) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    folder = run_dir / "checkpoints"
    return sorted(
        int(path.name[5:])
        for path in folder.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name)
    )


def newest(run_dir: Path) -> Path:
    """The newest committed checkpoint of a run. Raises UserError where there is none."""
    steps = committed_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint: train that run first, or correct the path")
    return folder_of(run_dir, steps[-1])


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint into; leftovers of an interrupted save are removed."""
    temporary = folder_of(run_dir, step).with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(run_dir: Path, step: int, meta: dict) -> None:
    """Hash every file, write meta.json last, and give the folder its name.

    It exists whole or not at all. The last key of meta.json is a hash of all the others.
    """
    target = folder_of(run_dir, step)
    temporary = target.with_suffix(".tmp")
    meta = {**meta, "files": {path.name: sha256(path) for path in sorted(temporary.iterdir())}}
    as_read = json.loads(json.dumps(meta))  # JSON has lists for tuples and strings for keys
    with open(temporary / META, "w") as file:
        file.write(seal(as_read))
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_meta(folder: Path, advice: str | None = None) -> dict:
    """meta.json of a committed checkpoint, after its own hash and that of every file was checked.

    torch's checkpoint metadata is a pickle: nothing is read from a folder whose files are not the ones committed.
    advice: where a file is damaged; by default for a run that can go on from an earlier checkpoint.
    Raises UserError that names the file.
    """
    advice = advice or (
        f"restore {folder} from a copy, or remove it to go on from the checkpoint before it"
    )
    meta = sealed_meta(folder)
    for name, expected in meta["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is missing or damaged: {advice}")
    there = {path.name for path in folder.iterdir() if _READ.fullmatch(path.name)}
    if unlisted := sorted(there - meta["files"].keys()):
        raise UserError(
            f"{folder / unlisted[0]} is not among the files that {folder / META} lists: {advice}"
        )
    return meta


def sealed_meta(folder: Path) -> dict:
    """meta.json of a committed checkpoint, after its own hash was checked; not those of its files.

    A checkpoint from before meta.json had a hash is read with a warning, once in a process.
    Raises UserError where meta.json is missing or not as it was written, or where the folder has
    another step's name.
    """
    meta = _parsed(folder)
    if _SEAL not in meta:
        _warn_of_no_seal(folder)
    elif not is_intact(meta):
        raise _changed(folder, "its contents are not those that it holds a hash of")
    if not isinstance(meta.get("files"), dict) or not meta["files"]:
        raise _changed(folder, "it lists no files")
    state = meta.get("train_state")
    step = state.get("step") if isinstance(state, dict) else None
    if (
        isinstance(step, int)
        and folder.name.startswith("step-")
        and folder.name != folder_of(Path(), step).name
    ):
        raise UserError(
            f"{folder} says in {META} that it is the checkpoint after step {step}: it was renamed "
            "or changed. "
            f"If it is that one, rename it to {folder_of(Path(), step).name}; else remove it"
        )
    return {key: value for key, value in meta.items() if key != _SEAL}


def fingerprint(folder: Path) -> str:
    """One hash over all files of a committed checkpoint.

    Of imported weights it is over what they were imported from, at any layout. Else it is the hash
    that meta.json holds of itself, and where it holds none (from before it did) that of the file.
    Raises UserError where meta.json is missing or not as it was written.
    """
    meta = _parsed(folder)
    if _SEAL in meta and not is_intact(meta):
        raise _changed(folder, "its contents are not those that it holds a hash of")
    return meta.get(IMPORTED) or meta.get(_SEAL) or sha256(folder / META)


def _parsed(folder: Path) -> dict:
    path = folder / META
    try:
        meta = json.loads(path.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no committed checkpoint: {META} is missing") from None
    except ValueError as error:
        raise _changed(folder, f"it is no JSON: {error}") from None
    if not isinstance(meta, dict):
        raise _changed(folder, "it holds no keys")
    return meta


def _changed(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder / META} was changed after it was written, or is damaged ({reason}): "
        f"restore it from a copy, or remove {folder} to go on from the checkpoint before it"
    )


@functools.cache
def _warn_of_no_seal(folder: Path) -> None:
    print(
        f"warning: {folder / META} has no hash of itself "
        "(an older version wrote it, or it was changed since): its files are checked, what it says of them is not",
        file=sys.stderr,
        flush=True,
    )


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
