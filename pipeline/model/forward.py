"""Micro-batches through a sharded model, by megatron-core's pipeline schedules. Shapes: B micro-batch, T sequence length."""

from collections.abc import Callable, Iterator

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from retemper.pipeline.data.batch import Batch
from retemper.pipeline.model import frozen_head
from retemper.pipeline.model.adapted import join_factors


def run_schedule(
    model: torch.nn.ModuleList, batches: list[Batch], *, forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """Forward, and unless forward_only backward, over micro-batches of one size.

    Returns for each micro-batch, on the last pipeline stage alone: loss (sum of nats), tokens (labels that count) and
    losses_BT (nats of every position), of what this context-parallel rank holds of the sequences.
    """
    if model.training:
        join_factors(list(model))
    return through_stages(model, batches, forward_step, forward_only=forward_only)


def through_stages(
    model: torch.nn.ModuleList, batches: list[Batch], forward_step: Callable, *, forward_only: bool
) -> list:
    """megatron-core's schedule over micro-batches of one size; what the loss function of forward_step reports of each, on the last
    pipeline stage alone."""
    stages = list(model)
    # Interleaved schedules take as many micro-batches at a time as the pipeline has ranks.
    group = stages[0].config.pipeline_model_parallel_size if len(stages) > 1 else 1
    filled = batches + batches[-1:] * (-len(batches) % group)
    assert forward_only or len(filled) == len(batches)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(filled) for _ in stages] if len(stages) > 1 else iter(filled),
        model=stages,
        num_microbatches=len(filled),
        seq_length=batches[0].shape[1],
        micro_batch_size=batches[0].shape[0],
        forward_only=forward_only,
    )
    return outputs[: len(batches)]


def forward_step(batches: Iterator[Batch], model):
    """The step that megatron-core's schedules take for each micro-batch: the model's output, and the function of its loss."""
    batch = next(batches)
    output_BT = model(
        batch.tokens_BT,
        batch.position_ids_BT,
        attention_mask=None,
        labels=batch.labels_BT,
        packed_seq_params=_packed_seq_params(batch),
        output_processor=frozen_head.losses if frozen_head.is_frozen(unwrap_model(model)) else None,
    )
    return output_BT, lambda losses_BT: _loss(losses_BT, batch)


def _loss(losses_BT: torch.Tensor, batch: Batch):
    loss = (losses_BT.float() * batch.loss_mask_BT).sum()
    tokens = batch.loss_mask_BT.sum().int()
    # The schedule divides what it is given in place: what is reported is a copy.
    return (
        loss,
        tokens,
        {"loss": loss.detach().clone(), "tokens": tokens.clone(), "losses_BT": losses_BT.detach()},
    )


def _packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    if batch.document_edges is None:
        return None
    edges, longest = batch.document_edges, batch.longest_document
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
