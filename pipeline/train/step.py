"""One optimizer step."""

import itertools
from dataclasses import dataclass

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.data.streams import stream_paths
from retemper.pipeline.distributed.collectives import all_reduce_from_last_stage
from retemper.pipeline.model.graph import Passes
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.anomaly import Anomaly, anomaly_in, record_step
from retemper.pipeline.train.norms import norms_of_step


@dataclass(frozen=True)
class StepResult:
    """The measurements of one optimizer step, the same on every rank."""

    # Nats per labelled token of the global batch; None where it has no such token.
    loss: float | None
    stream_losses: dict[str, float]  # the same of each stream of a mixture with such tokens
    grad_norm: float  # before clipping
    lr: float
    norms: dict[str, float]  # of weights and of their update, by kind; empty where not logged


def train_step(
    config: Config, state: TrainState, passes: Passes, optimizer, schedule, batches: list[Batch]
) -> StepResult | Anomaly:
    """Run one step: forward and backward over micro-batches, gradient reduction, optimizer step.

    Loss and gradient norm are checked before the optimizer step. A batch without a labelled token
    has zero gradients and no loss, and does not count in the history for anomaly detection.

    Args:
        config: of the run.
        state: after the last step that counts; its recent losses and gradient norms are updated.
        passes: the forward and backward passes of this rank's model stages.
        optimizer: from `build_optimizer`.
        schedule: from `build_schedule`; advanced by one step unless there is an anomaly.
        batches: this rank's micro-batches of the step.

    Returns:
        The measurements, or the anomaly, in which case no weight has changed.

    Collective: every rank must call this.
    """
    for stage in passes.model:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = passes(batches)
    streams = list(stream_paths(config)) if config.data.mixed_in else []
    sums = [
        sum(output[key] for output in outputs).double().flatten()
        for key in ("loss", "tokens", "by_stream")
        if outputs
    ]
    # The host waits for the norm here; by then the loss is available.
    grad_norm = norm_of_gradients(optimizer)
    nats, tokens, *by_stream = all_reduce_from_last_stage(
        torch.cat(sums) if sums else torch.zeros(2 + 2 * len(streams))
    )
    # Without a labelled token the sum is 0, or NaN where the model's output is NaN.
    if anomaly := anomaly_in(config, state, "losses", nats / max(tokens, 1)):
        return anomaly
    if anomaly := anomaly_in(config, state, "grad_norms", grad_norm):
        return anomaly
    lr = min(group["lr"] for group in optimizer.param_groups)  # LoRA+ gives B a higher one
    step_by_gradients(config, optimizer, grad_norm)
    norms = norms_of_step(passes.model, optimizer) if config.logs_after(state.step + 1) else {}
    schedule.step(config.tokens_per_step)
    if not tokens:
        return StepResult(None, {}, grad_norm, lr, norms)
    loss = nats / tokens
    record_step(state, loss, grad_norm)
    pairs = zip(streams, itertools.batched(by_stream, 2), strict=True)
    stream_losses = {name: nats / tokens for name, (nats, tokens) in pairs if tokens}
    return StepResult(loss, stream_losses, grad_norm, lr, norms)


def norm_of_gradients(optimizer) -> float:
    """Return the norm of the whole model's reduced gradients, before clipping.

    This is the first half of megatron-core's MegatronOptimizer.step.

    Collective: every rank must call this.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def step_by_gradients(config: Config, optimizer, grad_norm: float) -> None:
    """Clip the gradients by a norm that was checked, and apply the optimizer step.

    This is the second half of megatron-core's MegatronOptimizer.step.

    Args:
        config: of the run.
        optimizer: from `build_optimizer`, after `norm_of_gradients`.
        grad_norm: the norm that it returned.

    Collective: every rank must call this.
    """
    if config.optimizer.clip_grad:
        clip_grad_by_total_norm_fp32(
            optimizer.get_parameters(), config.optimizer.clip_grad, grad_norm
        )
    optimizer.step_with_ready_grads()
