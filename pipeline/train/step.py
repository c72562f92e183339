"""One optimizer step."""

import math
from dataclasses import dataclass

from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.topology import from_last_stage
from retemper.pipeline.errors import UserError
from retemper.pipeline.model.forward import run_schedule
from retemper.pipeline.schema import Config


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, the same on every rank."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # before clipping
    lr: float


def train_step(config: Config, model, optimizer, schedule, batches: list[Batch]) -> StepResult:
    """Forward and backward over this rank's micro-batches, gradients reduced, one optimizer step.

    Raises UserError on every rank alike, before anything is saved, when the loss or the gradient norm is not finite.
    """
    for stage in model:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = run_schedule(model, batches, forward_only=False)
    nats, tokens = from_last_stage([float(sum(output[key] for output in outputs)) for key in ("loss", "tokens")])
    _check_finite(config, "loss", nats)
    lr = min(group["lr"] for group in optimizer.param_groups)  # LoRA+ gives B a higher one
    _, grad_norm, _ = optimizer.step()
    _check_finite(config, "gradient norm", float(grad_norm))
    schedule.step(config.tokens_per_step)
    return StepResult(nats / max(tokens, 1), float(grad_norm), lr)


def _check_finite(config: Config, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {name} is {value}. The checkpoints in {config.run_dir} are kept; the newest may already be on the way there: "
            "remove it to try the steps after the one before again, or start under another name with a lower optimizer.lr"
        )
