"""W&B as a mirror of metrics.jsonl and evals/. The only module that imports wandb; its failures are said once and never stop a run.

W&B lets a second writer of a run overwrite the first one's history (wandb/wandb#10349), in its shared mode too (#12269). One process
at a time writes here: the training, and while it does not live whoever evaluates. What others score meanwhile, the training mirrors.
"""

import contextlib
import logging
import secrets
import sys
import time
from pathlib import Path

from retemper.pipeline.runs.eval_folder import mark_mirrored, unmirrored
from retemper.pipeline.runs.leases import is_held, lease
from retemper.pipeline.schema.run import Config

_AXIS = "step"  # of all figures. W&B's own step never goes back to a checkpoint that was scored late, and drops what is given with a smaller one
_TRAINING, _MIRRORING = "training", "mirroring"  # leases
_LEASE_SECONDS = 120
_SECONDS_BETWEEN_SCORES = 60


class Tracker:
    """One W&B run per run folder, the same one after every restart."""

    def __init__(self, config: Config):
        self._run = None
        self._run_dir = config.run_dir
        if config.track.wandb != "off":
            self._guard(lambda: self._start(config))

    def log(self, record: dict) -> None:
        """Mirror one record of metrics.jsonl."""
        if self._run is not None:
            self._guard(lambda: self._run.log(record))

    def scores(self) -> None:
        """Add what was scored, here or elsewhere."""
        if self._run is not None:
            self._guard(self._add_scores)

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._guard(lambda: self._run.finish())

    def _start(self, config: Config) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        mode = config.track.wandb
        if mode == "online" and not wandb.login(prompt=False):
            print(
                "W&B: nobody is logged in (`wandb login`); recording offline, `wandb sync` uploads it later",
                file=sys.stderr,
            )
            mode = "offline"
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
            mode=mode,
            dir=str(config.run_dir),
            config=config.model_dump(),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=20, disable_git=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric=_AXIS)

    def _add_scores(self) -> None:
        for step, figures in unmirrored(self._run_dir).items():
            self._run.log(figures | {_AXIS: step})
            mark_mirrored(self._run_dir, step, figures)

    def _guard(self, call) -> None:
        try:
            call()
        except Exception as error:  # whatever the network or the service does, training goes on
            print(
                f"W&B is left out from here on ({error}); metrics.jsonl has every record",
                file=sys.stderr,
            )
            self._run = None


class TrainingTracker(Tracker):
    """The tracker of the process that trains: of all that write to its W&B run, it comes first."""

    def __init__(self, config: Config):
        self._leases = contextlib.ExitStack()
        self._scores_due = 0.0
        if config.track.wandb != "off":
            folder = _leases_of(config)
            # A lease that is there is of the same training, which was killed.
            self._leases.enter_context(lease(folder, _TRAINING, _LEASE_SECONDS, take_over=True))
            deadline = time.monotonic() + _LEASE_SECONDS
            while is_held(folder, _MIRRORING, _LEASE_SECONDS) and time.monotonic() < deadline:
                time.sleep(0.5)
        super().__init__(config)

    def log(self, record: dict) -> None:
        """Mirror one record of metrics.jsonl, and every minute what was scored elsewhere."""
        super().log(record)
        if time.monotonic() > self._scores_due:
            self.scores()
            self._scores_due = time.monotonic() + _SECONDS_BETWEEN_SCORES

    def close(self) -> None:
        """Finish the W&B run, and leave it to others."""
        self.scores()
        super().close()
        self._leases.close()


def mirror_scores(config: Config) -> None:
    """Add to W&B what it does not have of evals/, unless another process is to."""
    if config.track.wandb == "off" or not unmirrored(config.run_dir):
        return
    folder = _leases_of(config)
    with lease(folder, _MIRRORING, _LEASE_SECONDS) as taken:
        if taken and not is_held(folder, _TRAINING, _LEASE_SECONDS):
            tracker = Tracker(config)
            tracker.scores()
            tracker.close()


def _leases_of(config: Config) -> Path:
    return config.run_dir / "wandb"
