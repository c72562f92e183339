"""The keys of a run: one strict schema, each field with what it means."""

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import Field

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
    """Where metrics are mirrored; runs/<study>/<name>/metrics.jsonl is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "retemper"


class Config(ModelSetup):
    """One run."""

    study: Name = Field(description="the experiment this run belongs to; the W&B group")
    name: Name = Field(description="of the run; its folder is runs_dir/study/name")
    runs_dir: str = "runs"
    init_from: str | None = Field(
        None,
        description="run folder whose checkpoint gives the initial weights: RUN for the newest at "
        "the time this run begins, RUN@STEP for an older one. base.json records which one it was",
    )
    branch_of: str | None = Field(
        None,
        description="run folder that this run goes on from, weights, optimizer and data, where its own cooldown begins",
    )
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    anomaly: AnomalyConfig
    profile: ProfileConfig
    checkpoint: CheckpointConfig
    evals: EvalsConfig
    track: TrackConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir, self.study, self.name)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.seq_length

    @property
    def steps(self) -> int:
        return self.train.tokens // self.tokens_per_step

    def logs_after(self, step: int) -> bool:
        """Whether a step is reported: every few, and the last."""
        return step % self.train.log_every_steps == 0 or step == self.steps

    @property
    def cooldown_fraction(self) -> float:
        """Of a trunk none: its branches cool down."""
        return 0.0 if self.train.branches else self.schedule.cooldown_fraction

    def cooldown_begins(self, tokens: int) -> int:
        """The step after which a run of so many tokens cools down."""
        return math.floor(tokens // self.tokens_per_step * (1 - self.schedule.cooldown_fraction))

    @property
    def branch_steps(self) -> list[int]:
        """Steps whose checkpoints this run's branches go on from."""
        return [self.cooldown_begins(tokens) for tokens in self.train.branches]

    @property
    def milestone_steps(self) -> list[int]:
        """Steps after which a milestone's checkpoint is saved and evaluated; the last step is always one."""
        return sorted(
            {
                min(max(1, tokens // self.tokens_per_step), self.steps)
                for tokens in self.checkpoint.milestones
            }
            | {self.steps}
        )

    @property
    def saved_steps(self) -> set[int]:
        """Steps after which a checkpoint is saved: milestones, beginnings of branches, and every few."""
        every = self.checkpoint.save_every_steps
        return {
            *self.milestone_steps,
            *self.branch_steps,
            *(range(every, self.steps + 1, every) if every else ()),
        }

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2)
