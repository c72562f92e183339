"""The loss of a frozen output layer, chunk by chunk, without a tensor of (tokens, vocabulary).

For a frozen layer the backward pass needs only the gradient of its input. That gradient is computed
at once, while a chunk's logits exist, and stored in their place: H numbers per token instead of V.
Liger Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989) does so on one rank.

Under tensor parallelism a rank knows the softmax of a chunk only up to one factor per token. So
each rank multiplies the softmax of its own shard, without the label's term, by the weight; the
factor and the label's term follow in the backward pass, and one exchange between ranks serves all
chunks.

Shapes: B micro-batch, S sequence (T in labels), H hidden size, N = S B tokens, P tokens of one
chunk, V this rank's shard of the vocabulary, R tensor-parallel ranks.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

# Tokens per chunk: enough to fill a GPU with one product of (P, H) and (H, V).
PIECE = 1024


def is_frozen(model: GPTModel) -> bool:
    """Return whether this stage has the output layer with a frozen (own or tied) weight."""
    if not model.post_process:
        return False
    if model.share_embeddings_and_output_weights:
        return not model.shared_embedding_or_output_weight().requires_grad
    return not model.output_layer.weight.requires_grad


def losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    **_rest,
) -> torch.Tensor:
    """Return the cross entropy of every label in nats, (B, T).

    This is an `output_processor` for GPTModel.forward.

    Args:
        hidden_states: (S, B, H); under sequence parallelism this rank's part of S.
        output_layer: The frozen layer.
        output_weight: The tied embedding's weight, (V, H), or None for the layer's own.
        labels: (B, T) int64.

    Returns:
        All losses on every tensor-parallel rank: float64 if hidden_states is float64, else float32.

    Collective: every tensor-parallel rank must call this.
    """
    weight_VH = output_layer.weight if output_weight is None else output_weight
    # The backward pass of either region sums the gradient over ranks, as the layer's own does.
    enter = copy_to_tensor_model_parallel_region
    if output_layer.sequence_parallel:
        enter = gather_from_sequence_parallel_region
    hidden_SBH = enter(hidden_states, group=output_layer.tp_group)
    with_gradient = torch.is_grad_enabled() and hidden_SBH.requires_grad
    losses_N = _FrozenHead.apply(
        hidden_SBH.flatten(0, 1), weight_VH, labels.t().flatten(), output_layer, with_gradient
    )
    return losses_N.view(hidden_SBH.shape[:2]).t().contiguous()


class _FrozenHead(torch.autograd.Function):
    """The losses, (N,), with a backward pass for the hidden states only.

    If with_gradient, the forward pass also computes the terms of that gradient.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, output_layer, with_gradient):
        first = output_layer.tp_group.rank() * len(weight_VH)
        is_local_N = (labels_N >= first) & (labels_N < first + len(weight_VH))
        local_N = torch.where(is_local_N, labels_N - first, -1)
        others_NH = torch.empty_like(hidden_NH) if with_gradient else None
        statistics = []
        for start in range(0, len(hidden_NH), PIECE):
            chunk = slice(start, start + PIECE)
            others_PH = others_NH[chunk] if with_gradient else None
            logits_PV = _logits(hidden_NH[chunk], weight_VH, output_layer)
            statistics.append(_measure(logits_PV, local_N[chunk], weight_VH, others_PH))
            del logits_PV
        shard_3N = torch.cat(statistics, dim=1)
        top_N, log_sum_N, labelled_N = _over_shards(shard_3N, output_layer.tp_group)
        # Both terms are small for a nearly certain label; a difference of whole logits would lose
        # the precision of its loss.
        losses_N = log_sum_N - (labelled_N - top_N)
        if with_gradient:
            largest_N, log_total_N, _ = shard_3N.unbind()
            share_N = (largest_N - top_N + log_total_N - log_sum_N).exp()
            # The label's probability minus one.
            missing_N = torch.where(is_local_N, torch.expm1(-losses_N), 0)
            ctx.save_for_backward(others_NH, weight_VH, local_N, share_N, missing_N)
        return losses_N

    @staticmethod
    def backward(ctx, gradient_N):
        others_NH, weight_VH, local_N, share_N, missing_N = ctx.saved_tensors
        of_others_N = gradient_N * share_N
        of_label_N = gradient_N * missing_N
        gradient_NH = _gradient(others_NH, weight_VH, local_N, of_others_N, of_label_N)
        return gradient_NH, None, None, None, None


def _logits(hidden_PH, weight_VH, output_layer: ColumnParallelLinear) -> torch.Tensor:
    """Return this rank's logits, (P, V), after the layer's forward hooks.

    One of these hooks masks the vocabulary's padding (build.py, _mask_padded_logits).
    """
    logits_PV = hidden_PH @ weight_VH.t()
    for hook in output_layer._forward_hooks.values():
        hook(output_layer, (hidden_PH,), (logits_PV, None))
    return logits_PV


def _measure(logits_PV, local_P, weight_VH, others_PH: torch.Tensor | None) -> torch.Tensor:
    """Return the first three results of _softmax, (3, P).

    The fourth one times the weight is written to others_PH, unless that is None.
    """
    *statistics, softmax_PV = _softmax(logits_PV, local_P, others_PH is not None)
    if softmax_PV is not None:
        torch.mm(softmax_PV, weight_VH, out=others_PH)
    return torch.stack(statistics)


@torch.compile  # fuses kernels on a GPU; disabled on a CPU (compat/megatron_cpu.py)
def _softmax(
    logits_PV: torch.Tensor, local_P: torch.Tensor, with_softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the softmax statistics of this rank's shard of the logits.

    Args:
        logits_PV: Overwritten if float32.
        local_P: The label's index in this shard, or -1.
        with_softmax: Whether to return the softmax, too.

    Returns:
        The largest logit, the logarithm of the sum of exp(logit - the largest), and the label's
        logit, or 0 if another rank has it, each (P,) and at least float32; and the softmax with 0
        for the label, (P, V) in the dtype of the logits, or None.
    """
    dtype = torch.promote_types(logits_PV.dtype, torch.float32)
    chosen_P = logits_PV.gather(1, local_P.clamp(min=0)[:, None])[:, 0].to(dtype)
    labelled_P = torch.where(local_P >= 0, chosen_P, 0)
    # A shard may consist of padding only, -inf: clamping avoids NaN, and its share of the sum is 0.
    wide_PV = logits_PV.to(dtype).clamp_(min=torch.finfo(dtype).min)
    largest_P1 = wide_PV.amax(1, keepdim=True)
    powers_PV = wide_PV.sub_(largest_P1).exp_()
    total_P1 = powers_PV.sum(1, keepdim=True)
    largest_P = largest_P1[:, 0]
    log_total_P = total_P1.log()[:, 0]
    if not with_softmax:
        return largest_P, log_total_P, labelled_P, None
    is_label_PV = torch.arange(logits_PV.shape[1], device=logits_PV.device) == local_P[:, None]
    softmax_PV = powers_PV.div_(total_P1).masked_fill_(is_label_PV, 0).to(logits_PV.dtype)
    return largest_P, log_total_P, labelled_P, softmax_PV


@torch.compile
def _gradient(others_NH, weight_VH, local_N, of_others_N, of_label_N) -> torch.Tensor:
    """Return this rank's contribution to the gradient of the hidden states, (N, H).

    It is the sum of both terms, each times its factor.
    """
    label_NH = weight_VH[local_N.clamp(min=0)]
    gradient_NH = others_NH * of_others_N[:, None] + label_NH * of_label_N[:, None]
    return gradient_NH.to(others_NH.dtype)


def _over_shards(
    shard_3N: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the statistics of _measure for the whole vocabulary, (N,) each.

    Collective: every tensor-parallel rank must call this.
    """
    if group.size() == 1:
        return shard_3N.unbind()
    shards = shard_3N.new_empty(group.size() * 3, shard_3N.shape[1])
    torch.distributed.all_gather_into_tensor(shards, shard_3N, group=group)
    shards_R3N = shards.view(group.size(), *shard_3N.shape)
    largest_RN, log_total_RN, labelled_RN = shards_R3N.unbind(1)
    top_N = largest_RN.amax(0)
    return top_N, (largest_RN - top_N + log_total_RN).logsumexp(0), labelled_RN.sum(0)
