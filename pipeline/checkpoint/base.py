"""The checkpoint that a run begins from: chosen once and recorded in its folder. Without torch."""

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
        """Of the checkpoint."""
        return commit.folder_of(self.path, self.step)

    def read_meta(self) -> dict[str, Any]:
        """meta.json of the checkpoint, after every hash was checked. Raises UserError."""
        return commit.read_meta(
            self.folder,
            f"restore {self.folder} from a copy, or import that model again. A run of another name "
            "may begin from another checkpoint",
        )

    def is_gone(self) -> bool:
        """Whether there is no checkpoint in its folder."""
        return not (self.folder / commit.META).is_file()

    def is_here(self) -> bool:
        """Whether the checkpoint in its folder is this one."""
        try:
            return not self.is_gone() and commit.fingerprint(self.folder) == self.fingerprint
        except UserError:  # meta.json was changed
            return False


def base_of(config: Config, fingerprint: str | None = None) -> Base | None:
    """The checkpoint that a run began from, or would begin from now.

    A run that has not begun takes the step that init_from asks for, or the newest. A branch has its
    trunk's base.

    Args:
        config: of the run. Its init_from says where the base is now.
        fingerprint: of the base, where it was chosen already but is not recorded yet.

    Returns:
        None where the run begins from no other run's weights.

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
        found = _with_fingerprint(config.init_from, fingerprint, config.run_dir)
        return locate(found, config.init_from, config.run_dir)
    return _chosen(config.init_from)


def base_of_checkpoint(folder: Path, meta: dict[str, Any]) -> Base | None:
    """The checkpoint that the run of a checkpoint began from.

    None where it began from no other run's weights. folder, meta: of the checkpoint.
    Raises UserError where the base is gone or was changed.
    """
    run_dir = folder.parent.parent
    init_from = meta["config"]["init_from"]
    if not init_from:
        return None
    fingerprint = meta["fingerprints"]["base"]
    recorded = read_record(run_dir)
    if recorded is None or recorded.fingerprint != fingerprint:
        return _with_fingerprint(init_from, fingerprint, folder)
    # A study that was moved as a whole has it where a relative path leads.
    named = replace(recorded, path=_absolute(init_from))
    return named if named.is_here() else locate(recorded, str(recorded.path), folder)


def record(config: Config, fingerprint: str | None) -> None:
    """Write down what a run began from, in its folder, and where that is now. Rank 0 only."""
    if base := base_of(config, fingerprint):
        values = {"path": str(base.path), "step": base.step, "fingerprint": base.fingerprint}
        replace_file(config.run_dir / RECORD, json.dumps(values, indent=2))


def read_record(run_dir: Path) -> Base | None:
    """What a run's folder says that the run began from; None where it says nothing.

    Raises UserError where the file is damaged.
    """
    path = run_dir / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return Base(Path(values["path"]), int(values["step"]), str(values["fingerprint"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: it does not hold the path, step and fingerprint of a checkpoint. "
            "Restore it from a copy; where the run has a checkpoint, you can also remove it"
        ) from None


def locate(base: Base, init_from: str, whose: Path) -> Base:
    """A recorded base in the folder where it is now.

    Args:
        base: as it was recorded.
        init_from: where it is now. A relative path that leads nowhere from here is where it was.
        whose: the folder of what began from it, for messages.

    Raises:
        UserError: that checkpoint is not there, or not the one recorded, or init_from asks for
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
            "or import that model again. Where the base was moved, `train` and `eval` take its new "
            "folder as init_from"
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
    """A base that is not recorded yet. Raises UserError where no checkpoint has its fingerprint."""
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
    """Of the base, as the newest checkpoint of a run holds it."""
    steps = commit.committed_steps(run_dir)
    meta = commit.sealed_meta(commit.folder_of(run_dir, steps[-1])) if steps else {}
    return meta.get("fingerprints", {}).get("base")


def _first[Found](found: Iterable[Found | None]) -> Found | None:
    return next((value for value in found if value is not None), None)
