"""W&B as a mirror of metrics.jsonl. The only module that imports wandb; its failures are said once and never stop a run."""

import logging
import secrets
import sys
from pathlib import Path

from retemper.pipeline.schema import Config

_SCORED = "scored_after_steps"


class Tracker:
    """One W&B run per run folder, the same one after every restart."""

    def __init__(self, config: Config):
        self._run = None
        if config.track.wandb != "off":
            self._guard(lambda: self._start(config))

    def log(self, record: dict) -> None:
        """Mirror one record of metrics.jsonl at its step."""
        if self._run is not None:
            self._guard(lambda: self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"]))

    def scores(self, step: int, figures: dict[str, float]) -> None:
        """Add what the model scored after `step` steps. It has an axis of its own, for W&B's step never goes back to a checkpoint."""
        if self._run is not None:
            self._guard(lambda: self._run.log(figures | {_SCORED: step}))

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._guard(lambda: self._run.finish())

    def _start(self, config: Config) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        mode = config.track.wandb
        if mode == "online" and not wandb.login(prompt=False):
            print("W&B: nobody is logged in (`wandb login`); recording offline, `wandb sync` uploads it later", file=sys.stderr)
            mode = "offline"
        id_file = config.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=config.track.project,
            group=f"{config.study}/{Path(config.branch_of).name}" if config.branch_of else config.study,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            mode=mode,
            dir=str(config.run_dir),
            config=config.model_dump(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=20, disable_git=True, save_code=False),
        )
        for scores in ("heldout/*", "evals/*"):
            self._run.define_metric(scores, step_metric=_SCORED)

    def _guard(self, call) -> None:
        try:
            call()
        except Exception as error:  # whatever the network or the service does, training goes on
            print(f"W&B is left out from here on ({error}); metrics.jsonl has every record", file=sys.stderr)
            self._run = None
