"""The keys of training: optimizer, schedule, length, anomalies, profile, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Fraction, PositiveInt, Section, Tokens


class OptimizerConfig(Section):
    """Biases and norms are not decayed."""

    name: Literal["adamw", "lion"] = Field(
        description="a step multiplies weights, adamw: by 1 - lr × weight_decay; lion: by 1 - lr / peak × weight_decay, 1e-6 is not small there"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, description="of adamw")
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0 switches clipping off")


class ScheduleConfig(Section):
    """The learning rate over tokens, after a linear warm-up from zero, which takes precedence over a cooldown.

    trapezoid: constant, then a linear cooldown; cosine: half a cosine; inverse_sqrt: peak × sqrt(warmup_tokens / tokens).
    """

    name: Literal["trapezoid", "cosine", "inverse_sqrt"]
    warmup_tokens: Tokens
    cooldown_fraction: Fraction = Field(
        0.2, description="of train.tokens; the last part of the trapezoid"
    )
    min_lr_ratio: Fraction = Field(
        0.0, description="final, for inverse_sqrt least, learning rate as a fraction of the peak"
    )


class TrainConfig(Section):
    """The amount and shape of training."""

    tokens: Tokens = Field(description="length of the run; rounded down to whole steps")
    global_batch_size: PositiveInt = Field(description="samples per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(description="samples per forward pass of one rank")
    log_every_steps: PositiveInt = 10
    cuda_graph: Literal["auto", "on", "off"] = Field(
        "auto",
        description="record the kernels of one micro-batch once and replay them, so that the GPU does not wait for the host; "
        "auto: LoRA on a GPU, where nothing but data parallelism, no recomputation and no dropout is asked for",
    )
    branches: list[Tokens] = Field(
        default=[],
        description="milestones as the paper has them: this run's rate stays constant, and for each of these token counts a run of its own "
        "goes on from this one's checkpoint where its cooldown begins (schedule.cooldown_fraction)",
    )


class AnomalyConfig(Section):
    """What becomes of a step whose loss or gradient norm is not finite, or leaps. It changes no weight and is never saved."""

    policy: Literal["stop", "rollback"] = Field(
        "stop",
        description="rollback: go on from the newest checkpoint and leave the batch out, which left_out.jsonl in the run's folder records",
    )
    spike_deviations: float | None = Field(
        None,
        gt=0,
        description="standard deviations above the mean of the last 100 steps that loss or gradient norm may lie; null: any",
    )
    left_out_steps: PositiveInt = Field(
        1, description="batches that a rollback leaves out, the last of them the one that leapt"
    )
    max_rollbacks: PositiveInt = Field(
        10, description="over all restarts of the run; one more ends it"
    )


class ProfileConfig(Section):
    """A trace of some steps of rank 0, for chrome://tracing or Perfetto."""

    steps: list[PositiveInt] | None = Field(
        None, min_length=2, max_length=2, description="the first and the last step, as [10,12]"
    )


class CheckpointConfig(Section):
    """When the run is saved, beside its end."""

    save_every_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="for restarts; 0 saves at milestones only"
    )
    milestones: list[Tokens] = Field(default=[], description="saved and evaluated")
