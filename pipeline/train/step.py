"""One optimizer step."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.collectives import from_last_stage
from retemper.pipeline.model.graph import Passes
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.anomaly import Anomaly, anomaly_in, remember
from retemper.pipeline.train.norms import norms_of_step


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, the same on every rank."""

    loss: (
        float | None
    )  # nats per labelled token of the global batch; None where it has no such token
    grad_norm: float  # before clipping
    lr: float
    norms: dict[str, float]  # of weights and of their update, by kind, where they are logged


def train_step(
    config: Config, state: TrainState, passes: Passes, optimizer, schedule, batches: list[Batch]
) -> StepResult | Anomaly:
    """Forward and backward over this rank's micro-batches, gradients reduced, one optimizer step.

    Loss and gradient norm are looked at before it: an Anomaly has changed no weight. A batch without
    a labelled token has gradients of zero and no loss; later steps are not held against it.
    """
    for stage in passes.model:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = passes(batches)
    sums = [
        sum(output[key] for output in outputs).double() for key in ("loss", "tokens") if outputs
    ]
    # The host waits for the norm, and has the loss by then.
    grad_norm = norm_of_gradients(optimizer)
    nats, tokens = from_last_stage(torch.stack(sums) if sums else torch.zeros(2))
    # Without a labelled token the sum is 0, or no number where the model's output is none.
    if anomaly := anomaly_in(config, state, "losses", nats / max(tokens, 1)):
        return anomaly
    if anomaly := anomaly_in(config, state, "grad_norms", grad_norm):
        return anomaly
    lr = min(group["lr"] for group in optimizer.param_groups)  # LoRA+ gives B a higher one
    step_by_gradients(config, optimizer, grad_norm)
    norms = norms_of_step(passes.model, optimizer) if config.logs_after(state.step + 1) else {}
    schedule.step(config.tokens_per_step)
    if not tokens:
        return StepResult(None, grad_norm, lr, norms)
    loss = nats / tokens
    remember(state, loss, grad_norm)
    return StepResult(loss, grad_norm, lr, norms)


def norm_of_gradients(optimizer) -> float:
    """Of the whole model's reduced gradients, before clipping: the first half of megatron-core's MegatronOptimizer.step."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def step_by_gradients(config: Config, optimizer, grad_norm: float) -> None:
    """Clip by a norm that was looked at, and step: the other half."""
    if config.optimizer.clip_grad:
        clip_grad_by_total_norm_fp32(
            optimizer.get_parameters(), config.optimizer.clip_grad, grad_norm
        )
    optimizer.step_with_ready_grads()
