"""W&B as a mirror of metrics.jsonl and evals/.

This is the only module that imports wandb; its failures are printed once and never stop a run.

W&B lets a second writer of a run overwrite the first one's history (wandb/wandb#10349), even in its
shared mode (#12269). Therefore only one process at a time writes: the training, or, while no
training is alive, an evaluation. The training mirrors the scores that others write meanwhile.
"""

import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from retemper.pipeline.compat.light_imports import import_wandb
from retemper.pipeline.runs.eval_folder import mark_mirrored, scores_missing_in_wandb
from retemper.pipeline.runs.leases import is_held, lease
from retemper.pipeline.schema.run import Config

if TYPE_CHECKING:
    import wandb

# The axis of all figures. W&B's own step never decreases, and values logged with a smaller one,
# like those of a checkpoint that is scored late, are dropped.
_AXIS = "step"
_TRAINING, _MIRRORING = "training", "mirroring"  # leases
_LEASE_SECONDS = 120
_SECONDS_BETWEEN_SCORES = 60


class Tracker:
    """One W&B run per run folder, the same one after every restart."""

    def __init__(self, config: Config):
        self._run: wandb.Run | None = None
        self._run_dir = config.run_dir
        if config.track.wandb != "off":
            self._guard(lambda: self._start(config))

    def log(self, record: dict) -> None:
        """Mirror one record of metrics.jsonl."""
        if (run := self._run) is not None:
            self._guard(lambda: run.log(record))

    def scores(self) -> None:
        """Log the scores that W&B does not have yet, of this process or of others."""
        if (run := self._run) is not None:
            self._guard(lambda: self._add_scores(run))

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._guard(self._run.finish)

    def _start(self, config: Config) -> None:
        wandb = import_wandb()
        logging.getLogger("wandb").setLevel(logging.ERROR)
        online = config.track.wandb == "online"
        if online and not wandb.login(prompt=False):
            print(
                "W&B: not logged in (see `wandb login`); recording offline, "
                "`wandb sync` uploads the run later",
                file=sys.stderr,
            )
            online = False
        id_file = config.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=config.track.project,
            group=f"{config.study}/{Path(config.branch_of).name}"
            if config.branch_of
            else config.study,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            mode="online" if online else "offline",
            dir=str(config.run_dir),
            config=config.model_dump(),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=20, disable_git=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric=_AXIS)

    def _add_scores(self, run: "wandb.Run") -> None:
        for step, figures in scores_missing_in_wandb(self._run_dir).items():
            run.log(figures | {_AXIS: step})
            mark_mirrored(self._run_dir, step, figures)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # no failure of the network or the service may stop training
            print(
                f"W&B logging disabled after an error ({error}); metrics.jsonl is complete",
                file=sys.stderr,
            )
            self._run = None


class TrainingTracker(Tracker):
    """The tracker of the training process, which has precedence over all other writers."""

    def __init__(self, config: Config):
        self._leases = contextlib.ExitStack()
        self._scores_due = 0.0
        if config.track.wandb != "off":
            folder = _leases_of(config)
            # An existing lease belongs to the same training, which was killed.
            self._leases.enter_context(lease(folder, _TRAINING, _LEASE_SECONDS, take_over=True))
            deadline = time.monotonic() + _LEASE_SECONDS
            while is_held(folder, _MIRRORING, _LEASE_SECONDS) and time.monotonic() < deadline:
                time.sleep(0.5)
        super().__init__(config)

    def log(self, record: dict) -> None:
        """Mirror one record of metrics.jsonl, and every minute the scores of other processes."""
        super().log(record)
        if time.monotonic() > self._scores_due:
            self.scores()
            self._scores_due = time.monotonic() + _SECONDS_BETWEEN_SCORES

    def close(self) -> None:
        """Finish the W&B run, and release its lease for other writers."""
        self.scores()
        super().close()
        self._leases.close()


def mirror_scores(config: Config) -> None:
    """Log to W&B the scores in evals/ that it lacks, unless another process will do so."""
    if config.track.wandb == "off" or not scores_missing_in_wandb(config.run_dir):
        return
    folder = _leases_of(config)
    with lease(folder, _MIRRORING, _LEASE_SECONDS) as taken:
        if taken and not is_held(folder, _TRAINING, _LEASE_SECONDS):
            tracker = Tracker(config)
            tracker.scores()
            tracker.close()


def _leases_of(config: Config) -> Path:
    return config.run_dir / "wandb"
