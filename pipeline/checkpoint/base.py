"""The checkpoint that a run starts from: chosen once and recorded in its folder. Without torch."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.config.stored import base_folder, base_step
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.json_file import read_json
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.schema.run import Config

RECORD = "base.json"


@dataclass(frozen=True)
class Base:
    """One committed checkpoint of another run, whose folder is `path`."""

    path: Path
    step: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.path} after step {self.step}"

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return commit.folder_of(self.path, self.step)

    def read_meta(self) -> dict[str, Any]:
        """Return meta.json of the checkpoint, after checking every hash.

        Raises:
            UserError: a file is missing or damaged.
        """
        return commit.read_meta(
            self.folder,
            f"restore {self.folder} from a copy, or import that model again. A run of another name "
            "may begin from another checkpoint",
        )

    def is_gone(self) -> bool:
        """Return whether there is no checkpoint in its folder."""
        return not (self.folder / commit.META).is_file()

    def is_here(self) -> bool:
        """Return whether the checkpoint in its folder has this fingerprint."""
        try:
            return not self.is_gone() and commit.fingerprint(self.folder) == self.fingerprint
        except UserError:  # meta.json was changed
            return False


def base_of(config: Config, fingerprint: str | None = None) -> Base | None:
    """Return the checkpoint that a run started from, or would start from now.

    A run that has not started takes the step that init_from names, or the newest. A branch has its
    trunk's base.

    Args:
        config: of the run. Its init_from names the present location of the base.
        fingerprint: of the base, where it was chosen already but is not recorded yet.

    Returns:
        The base, or None where the run does not start from the weights of another run.

    Raises:
        UserError: the base is gone, was changed, or is not what init_from names.
    """
    if config.init_from is None:
        return None
    run_dirs = [*reversed(eval_folder.homes(config, 0))]
    if recorded := _first(map(read_record, run_dirs)):
        return locate(recorded, config.init_from, config.run_dir)
    fingerprint = fingerprint or _first(map(_fingerprint_in_checkpoints, run_dirs))
    if fingerprint:
        base = _with_fingerprint(config.init_from, fingerprint, config.run_dir)
        return locate(base, config.init_from, config.run_dir)
    return _chosen(config.init_from)


def base_of_checkpoint(folder: Path, meta: dict[str, Any]) -> Base | None:
    """Return the checkpoint that the run of another checkpoint started from.

    Args:
        folder: of the checkpoint.
        meta: its meta.json.

    Returns:
        The base, or None where the run did not start from the weights of another run.

    Raises:
        UserError: the base is missing or was changed.
    """
    run_dir = folder.parent.parent
    init_from = meta["config"]["init_from"]
    if not init_from:
        return None
    fingerprint = meta["fingerprints"]["base"]
    recorded = read_record(run_dir)
    if recorded is None or recorded.fingerprint != fingerprint:
        return _with_fingerprint(init_from, fingerprint, folder)
    # In a study that was moved as a whole, a relative path leads to the base.
    named = replace(recorded, path=_absolute(init_from))
    return named if named.is_here() else locate(recorded, str(recorded.path), folder)


def record(config: Config, fingerprint: str | None) -> None:
    """Record in a run's folder which base it started from and where that is now. Rank 0 only."""
    if base := base_of(config, fingerprint):
        values = {"path": str(base.path), "step": base.step, "fingerprint": base.fingerprint}
        replace_file(config.run_dir / RECORD, json.dumps(values, indent=2))


def read_record(run_dir: Path) -> Base | None:
    """Return the base that is recorded in a run's folder, or None without a record.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / RECORD
    if not path.is_file():
        return None
    return read_json(
        path,
        Base,
        "restore it from a copy; where the run has a checkpoint, you can also remove it",
    )


def locate(base: Base, init_from: str, whose: Path) -> Base:
    """Return a recorded base with the folder where it is now.

    Args:
        base: as it was recorded.
        init_from: its present location. If it is a relative path to no folder, the recorded
            location is used.
        whose: the folder of the run or checkpoint that started from it, for messages.

    Raises:
        UserError: that checkpoint is missing, or not the one recorded, or init_from names
            another step.
    """
    began = f"{whose} began from {base}"
    if base_step(init_from) not in (None, base.step):
        raise UserError(
            f"init_from={init_from}: {began}: leave out @{base_step(init_from)}, "
            "or choose another name for a run from another checkpoint"
        )
    named = base_folder(init_from)
    leads_somewhere = named.is_absolute() or named.is_dir()
    here = replace(base, path=_absolute(init_from)) if leads_somewhere else base
    if here.is_here():
        return here
    if here.path == base.path:
        what = "is gone" if here.is_gone() else "was changed since"
        raise UserError(
            f"{began}, and that checkpoint, {here.folder}, {what}: restore it there from a copy, "
            "or import that model again. Where the base was moved, `retemper train` and "
            "`retemper eval run` take its new folder as init_from"
        )
    what = "does not exist" if here.is_gone() else "is another checkpoint"
    raise UserError(
        f"init_from={init_from}: {began}, but {here.folder} {what}. Name the folder that this "
        f"base was moved to, or init_from={base.path}; a run from another base needs another name"
    )


def _chosen(init_from: str) -> Base:
    path = _absolute(init_from)
    steps = _steps_in(path, init_from)
    step = steps[-1] if base_step(init_from) is None else base_step(init_from)
    if step not in steps:
        raise UserError(
            f"init_from={init_from}: {path} has no checkpoint after step {step}; "
            f"it has those after the steps {', '.join(map(str, steps))}"
        )
    return Base(path, step, commit.fingerprint(commit.folder_of(path, step)))


def _with_fingerprint(init_from: str, fingerprint: str, whose: Path) -> Base:
    """Return the checkpoint in init_from that has a fingerprint.

    Raises:
        UserError: there is none.
    """
    path = _absolute(init_from)
    steps = _steps_in(path, init_from)
    for base in (Base(path, step, fingerprint) for step in reversed(steps)):
        if base.is_here():
            return base
    raise UserError(
        f"init_from={init_from}: {whose} began from a checkpoint with the fingerprint "
        f"{fingerprint}, and none in {path} has that one (after the steps "
        f"{', '.join(map(str, steps))}): it was removed or changed, or was never there. Restore it "
        "from a copy, or import that model again"
    )


def _absolute(init_from: str) -> Path:
    return Path(os.path.abspath(base_folder(init_from)))


def _steps_in(path: Path, init_from: str) -> list[int]:
    if steps := commit.committed_steps(path):
        return steps
    raise UserError(
        f"init_from={init_from}: {path} has no checkpoint: train or import that model first, "
        "correct the path, or go to the folder that it is relative to"
    )


def _fingerprint_in_checkpoints(run_dir: Path) -> str | None:
    """Return the base's fingerprint that is stored in the newest checkpoint of a run."""
    steps = commit.committed_steps(run_dir)
    meta = commit.sealed_meta(commit.folder_of(run_dir, steps[-1])) if steps else {}
    return meta.get("fingerprints", {}).get("base")


def _first[T](values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)
