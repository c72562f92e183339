"""One optimizer step."""

import math
from dataclasses import dataclass

from retemper.pipeline.config import Config
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.topology import from_last_stage
from retemper.pipeline.errors import UserError
from retemper.pipeline.model.forward import run_schedule


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, the same on every rank."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # before clipping
    lr: float


def train_step(config: Config, model, optimizer, schedule, batches: list[Batch]) -> StepResult:
    """Forward and backward over this rank's micro-batches, gradients reduced, one optimizer step.

    Raises UserError on every rank alike, before the optimizer steps, when the loss is not finite.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = run_schedule(config, model, batches, forward_only=False)
    nats, tokens = from_last_stage([float(sum(output[key] for output in outputs)) for key in ("loss", "tokens")])
    if not math.isfinite(nats):
        raise UserError(f"the loss is {nats}; the checkpoints before this step are kept: lower optimizer.lr, or look at this step's data")
    lr = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    schedule.step(config.tokens_per_step)
    return StepResult(nats / tokens, float(grad_norm), lr)
