"""One optimizer step, and one evaluation pass, through megatron-core's pipeline schedules.

Shapes: B micro-batch, T sequence length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from retemper.pipeline.config import Config
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.topology import from_last_stage
from retemper.pipeline.errors import UserError


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
    transformer = get_model_config(model)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = _mean_loss(_run(config, model, batches, forward_only=False))
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}; the checkpoints before this step are kept: lower optimizer.lr, or look at this step's data")
    lr = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    schedule.step(config.tokens_per_step)
    return StepResult(loss, float(grad_norm), lr)


def _mean_loss(outputs: list[dict[str, torch.Tensor]]) -> float:
    total, tokens = from_last_stage([float(sum(o["loss"] for o in outputs)), float(sum(o["tokens"] for o in outputs))])
    return total / tokens


@torch.no_grad()
def token_losses(config: Config, model, batches: list[Batch]) -> list[torch.Tensor]:
    """Per-token losses (B, T) in nats of each batch; empty on ranks that do not hold the last stage."""
    return [output["losses"] for output in _run(config, model, batches, forward_only=True)]


def _run(config: Config, model, batches: list[Batch], *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=config.data.seq_length,
        micro_batch_size=batches[0].tokens_BT.shape[0],
        forward_only=forward_only,
    )


def _forward_step(batches: Iterator[Batch], model):
    batch = next(batches)
    output_BT = model(batch.tokens_BT, batch.position_ids_BT, attention_mask=None, labels=batch.labels_BT)
    return output_BT, lambda losses_BT: _loss(losses_BT, batch)


def _loss(losses_BT: torch.Tensor, batch: Batch):
    loss_sum = (losses_BT.float() * batch.loss_mask_BT).sum()
    tokens = batch.loss_mask_BT.sum().int()
    # The schedule divides what it is given in place: what is logged is a copy.
    return loss_sum, tokens, {"loss": loss_sum.detach().clone(), "tokens": tokens.clone(), "losses": losses_BT.detach()}
