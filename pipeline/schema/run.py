"""The config keys of a run: one strict schema, with a description of each field."""

import json
import math
from pathlib import Path
from typing import Literal

from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.evals import EvalsConfig
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.section import Name, Section
from retemper.pipeline.schema.train import (
    AnomalyConfig,
    CheckpointConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)


class TrackConfig(Section):
    """The tracker that metrics are mirrored to.

    The file runs/<study>/<name>/metrics.jsonl is always written.
    """

    wandb: Literal["offline", "online", "off"] = "offline"
    """W&B mode. offline: record to the run's folder, to be uploaded by `wandb sync`; online:
    upload during the run; off: do not record."""
    project: str = "retemper"
    """W&B project."""


class Config(ModelSetup):
    """The config of one run."""

    study: Name
    """Name of the experiment that this run belongs to; also the W&B group."""
    name: Name
    """Name of the run; its folder is runs_dir/study/name."""
    runs_dir: str = "runs"
    """Folder of all studies."""
    init_from: str | None = None
    """Run folder with the checkpoint of the initial weights: RUN for the newest checkpoint when
    this run begins, RUN@STEP for another one. base.json records which one it was."""
    branch_of: str | None = None
    """Run folder that this run continues, with weights, optimizer and data, from the step at
    which its own cooldown begins."""
    data: DataConfig
    """Corpora and how they are read."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig
    """Learning-rate schedule."""
    train: TrainConfig
    """Length and batch sizes of training."""
    anomaly: AnomalyConfig
    """Handling of anomalous steps."""
    profile: ProfileConfig
    """Trace of some steps."""
    checkpoint: CheckpointConfig
    """Steps at which checkpoints are saved."""
    evals: EvalsConfig
    """Evaluations."""
    track: TrackConfig
    """Tracking of metrics."""

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.runs_dir, self.study, self.name)

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens of one optimizer step."""
        return self.train.global_batch_size * self.data.seq_length

    @property
    def steps(self) -> int:
        """The number of whole optimizer steps of the run."""
        return self.train.tokens // self.tokens_per_step

    def logs_after(self, step: int) -> bool:
        """Return whether a step is logged: every log_every_steps-th step, and the last."""
        return step % self.train.log_every_steps == 0 or step == self.steps

    @property
    def cooldown_fraction(self) -> float:
        """The fraction of the run that is its cooldown; 0 for a trunk, whose branches cool down."""
        return 0.0 if self.train.branches else self.schedule.cooldown_fraction

    def cooldown_begins(self, tokens: int) -> int:
        """Return the step after which a run of `tokens` tokens cools down."""
        return math.floor(tokens // self.tokens_per_step * (1 - self.schedule.cooldown_fraction))

    @property
    def branch_steps(self) -> list[int]:
        """The steps of this run from whose checkpoints its branches continue."""
        return [self.cooldown_begins(tokens) for tokens in self.train.branches]

    @property
    def milestone_steps(self) -> list[int]:
        """The steps after which a milestone's checkpoint is saved and evaluated.

        The last step is always one of them.
        """
        return sorted(
            {
                min(max(1, tokens // self.tokens_per_step), self.steps)
                for tokens in self.checkpoint.milestones
            }
            | {self.steps}
        )

    @property
    def saved_steps(self) -> set[int]:
        """The steps after which a checkpoint is saved.

        These are milestones, steps from which branches continue, and every save_every_steps-th.
        """
        every = self.checkpoint.save_every_steps
        return {
            *self.milestone_steps,
            *self.branch_steps,
            *(range(every, self.steps + 1, every) if every else ()),
        }

    def to_json(self) -> str:
        """Return the config as indented JSON."""
        return json.dumps(self.model_dump(), indent=2)
