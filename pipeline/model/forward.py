"""Forward and backward passes over micro-batches, by megatron-core's pipeline schedules.

Shapes: B micro-batch, T sequence length.
"""

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
    """Run the forward and, unless forward_only, the backward passes of micro-batches.

    Args:
        model: The virtual stages of this rank.
        batches: Micro-batches of equal size.
        forward_only: Skip the backward passes.

    Returns:
        A dictionary for each micro-batch, on the last pipeline stage only: loss (sum in nats),
        tokens (number of labels in the loss mask), by_stream (both of each stream of a mixture,
        float64 (streams, 2)) and losses_BT (nats of every position). Each context-parallel rank
        returns the values of its part of the sequences.

    Collective: every rank must call this.
    """
    if model.training:
        join_factors(list(model))
    return run_pipeline(model, batches, forward_step, forward_only=forward_only)


def run_pipeline(
    model: torch.nn.ModuleList, batches: list[Batch], forward_step: Callable, *, forward_only: bool
) -> list:
    """Run megatron-core's schedule over micro-batches.

    Args:
        model: The virtual stages of this rank.
        batches: Micro-batches of equal size.
        forward_step: Computes the output of a micro-batch, and returns it with its loss function.
        forward_only: Skip the backward passes.

    Returns:
        What that loss function reports for each micro-batch, on the last pipeline stage only.

    Collective: every rank of a model replica must call this.
    """
    stages = list(model)
    # Interleaved schedules process micro-batches in groups of as many as the pipeline has ranks.
    group = stages[0].config.pipeline_model_parallel_size if len(stages) > 1 else 1
    padded_batches = batches + batches[-1:] * (-len(batches) % group)
    assert forward_only or len(padded_batches) == len(batches)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(padded_batches) for _ in stages]
        if len(stages) > 1
        else iter(padded_batches),
        model=stages,
        num_microbatches=len(padded_batches),
        seq_length=batches[0].shape[1],
        micro_batch_size=batches[0].shape[0],
        forward_only=forward_only,
    )
    return outputs[: len(batches)]


def forward_step(batches: Iterator[Batch], model):
    """Return the model's output for the next micro-batch, and its loss function.

    megatron-core's schedules call this for each micro-batch.
    """
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
    assert batch.loss_mask_BT is not None, "the stage that computes a loss has a mask"
    loss = (losses_BT.float() * batch.loss_mask_BT).sum()
    tokens = batch.loss_mask_BT.sum().int()
    # The schedule divides the loss and the number of tokens in place, so copies are reported.
    report = {
        "loss": loss.detach().clone(),
        "tokens": tokens.clone(),
        "by_stream": _sums_by_stream(losses_BT.detach(), batch),
        "losses_BT": losses_BT.detach(),
    }
    return loss, tokens, report


def _sums_by_stream(losses_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss in nats and the number of labels of each stream, float64 (streams, 2)."""
    sums = losses_BT.new_zeros(batch.streams, 2, dtype=torch.float64)
    if batch.stream_numbers is None or batch.loss_mask_BT is None:
        return sums
    samples = len(batch.stream_numbers)
    # With document masks B is 1, and the samples are concatenated along T.
    mask_NT = batch.loss_mask_BT.reshape(samples, -1).double()
    nats_N = (losses_BT.reshape(samples, -1) * mask_NT).sum(1)
    return sums.index_add_(0, batch.stream_numbers, torch.stack([nats_N, mask_NT.sum(1)], 1))


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
