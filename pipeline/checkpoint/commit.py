"""Checkpoint folders on disk: written under a temporary name, committed by one rename, verified before anything in them is read."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from retemper.pipeline.errors import UserError

META = "meta.json"
IMPORTED = "imported"  # in meta.json of imported weights: a hash of what they were imported from


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands once it is committed."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed_steps(run_dir: Path) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    folder = run_dir / "checkpoints"
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


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
    """Hash every file, write meta.json last, and give the folder its name: it exists whole or not at all."""
    target = folder_of(run_dir, step)
    temporary = target.with_suffix(".tmp")
    meta = {**meta, "files": {path.name: sha256(path) for path in sorted(temporary.iterdir())}}
    with open(temporary / META, "w") as file:
        json.dump(meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_meta(folder: Path) -> dict:
    """meta.json of a committed checkpoint, after every file's hash was checked.

    torch's checkpoint metadata is a pickle: nothing is read from a folder whose files are not the ones committed.
    Raises UserError that names the file.
    """
    path = folder / META
    if not path.is_file():
        raise UserError(f"{folder} is no committed checkpoint: {META} is missing")
    meta = json.loads(path.read_text())
    for name, expected in meta["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is missing or damaged: remove {folder} to go on from the checkpoint before it")
    return meta


def fingerprint(folder: Path) -> str:
    """One hash over all files of a committed checkpoint; of imported weights, over what they were imported from, at any layout."""
    return json.loads((folder / META).read_text()).get(IMPORTED) or sha256(folder / META)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
