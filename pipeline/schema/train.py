"""The config keys of training: optimizer, schedule, length, anomalies, profile, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Fraction, PositiveInt, Section, Tokens


class OptimizerConfig(Section):
    """The optimizer. Biases and norms have no weight decay."""

    name: Literal["adamw", "lion"]
    """Optimizer. Each step of adamw multiplies weights by 1 - lr × weight_decay, each step of
    lion by 1 - lr / peak lr × weight_decay: weight decay is decoupled from the learning rate for
    Lion. Its usual values are therefore much smaller than AdamW's, such as 1e-6."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """adamw: decay rate of the average of gradients; lion: weight of the momentum against the
    gradient in an update."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """adamw: decay rate of the average of squared gradients; lion: decay rate of the momentum."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator for numerical stability (adamw)."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay; see name for its effect."""
    clip_grad: float = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""


class ScheduleConfig(Section):
    """The learning rate as a function of tokens.

    A linear warm-up from zero comes first and takes precedence over a cooldown. After it, the
    learning rate is, for trapezoid: constant, then a linear cooldown; for cosine: half a cosine;
    for inverse_sqrt: peak × sqrt(warmup_tokens / tokens).
    """

    name: Literal["trapezoid", "cosine", "inverse_sqrt"]
    """Shape of the learning rate after warm-up."""
    warmup_tokens: Tokens
    """Length of the linear warm-up in tokens."""
    warmup_fraction: Fraction | None = None
    """Length of the linear warm-up as a fraction of train.tokens; sets warmup_tokens."""
    cooldown_fraction: Fraction = 0.2
    """Fraction of train.tokens for the cooldown at the end of a trapezoid."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate as a fraction of the peak; for inverse_sqrt the minimum."""


class TrainConfig(Section):
    """The length of training and the size of its batches."""

    tokens: Tokens
    """Length of the run in tokens, rounded down to whole steps. Required without epochs."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs of its own corpus, rounded down to whole steps; sets tokens. Each
    epoch reads the samples in another order, and a batch may contain the end of one and the
    beginning of the next. With a mixture, an epoch is as long as the own corpus lasts."""
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt
    """Samples per forward pass of one rank."""
    log_every_steps: PositiveInt = 10
    """Number of steps between log lines."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record the kernels of one micro-batch as a CUDA graph and replay it, so that the GPU does
    not wait for the host. auto: only for LoRA in bf16 or fp8_tensorwise on a GPU, with data
    parallelism alone, without dropout, and without recomputation other than swiglu."""
    branches: list[Tokens] = Field(default=[])
    """Milestones as in the paper: the learning rate of this run stays constant, and for each of
    these token counts, or epochs as 2ep, a separate run continues from the checkpoint of this one
    at which its cooldown begins (schedule.cooldown_fraction)."""


class AnomalyConfig(Section):
    """The handling of steps whose loss or gradient norm is not finite, or spikes.

    Such a step changes no weight and is never saved.
    """

    policy: Literal["stop", "rollback"] = "stop"
    """stop: end the run; rollback: resume from the newest checkpoint and skip the batch, which
    is recorded in skipped_batches.jsonl in the run's folder."""
    spike_deviations: float | None = Field(None, gt=0)
    """Maximum distance of loss or gradient norm above the mean of the last 100 steps, in
    standard deviations. null allows any finite value."""
    skip_batches: PositiveInt = 1
    """Number of batches that a rollback skips, up to and including the spike."""
    max_rollbacks: PositiveInt = 10
    """Maximum number of rollbacks, counted across restarts; then the run fails."""


class ProfileConfig(Section):
    """A trace of some steps of rank 0, for chrome://tracing or Perfetto."""

    steps: list[PositiveInt] | None = Field(None, min_length=2, max_length=2)
    """First and last step of the trace, e.g. [10,12]. null records none."""


class CheckpointConfig(Section):
    """The steps at which the run is saved, in addition to its last step."""

    save_every_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps between checkpoints for restarts. 0 saves at milestones and at the end only,
    so that a run that is killed loses what it trained since."""
    milestones: list[Tokens] = Field(default=[])
    """Token counts, or epochs as 2ep, at which a checkpoint is saved and evaluated."""
