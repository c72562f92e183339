"""Inference with a sharded model: log-likelihoods of continuations, and text generation.

The vocabulary stays sharded: log-likelihoods are computed from sums over the shards, and only the
logits of the next token are gathered. Keys and values are kept in megatron-core's static inference
context, in which all rows of a batch have the same position.

Shapes: B batch, T sequence length, S sequence as layers see it, H hidden size, N selected
positions, V vocabulary (this rank's shard unless stated otherwise).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import unwrap_model

from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model.forward import run_pipeline


@torch.no_grad()
def log_likelihoods(model: torch.nn.ModuleList, batches: list[Batch]) -> list[torch.Tensor]:
    """Return the log-likelihood of each row's labels where the loss mask is set.

    Args:
        model: The virtual stages of this rank.
        batches: Micro-batches of equal size.

    Returns:
        One float64 tensor (B, 2) for each micro-batch, on the last pipeline stage only: the
        log-likelihood in nats of a row's labels, and how many of them are not the model's most
        likely token. Each context-parallel rank returns the values of its part of the sequences.

    Collective: every rank of a model replica must call this.
    """
    with _for_inference(model):
        return run_pipeline(model, batches, _scoring_step, forward_only=True)


def _scoring_step(batches: Iterator[Batch], model):
    batch = next(batches)
    score = partial(_score, batch=batch, group=unwrap_model(model).pg_collection.tp)
    output = model(
        batch.tokens_BT, batch.position_ids_BT, attention_mask=None, output_processor=score
    )
    return output, lambda scores_B2: (scores_B2.sum(), torch.ones((), dtype=torch.int), scores_B2)


def _score(
    *, hidden_states, output_layer, output_weight, batch: Batch, group, **_rest
) -> torch.Tensor:
    assert batch.loss_mask_BT is not None and batch.labels_BT is not None
    counts_BT = batch.loss_mask_BT > 0
    # Compute logits only where the loss mask is set: for a question with few-shot examples that is
    # one token in a hundred.
    logits_NV = output_layer(
        hidden_states.transpose(0, 1)[counts_BT].unsqueeze(0), weight=output_weight
    )[0][0].float()
    nats_N, missed_N = _label_log_probabilities(logits_NV, batch.labels_BT[counts_BT], group)
    rows_N = counts_BT.nonzero()[:, 0]
    scores_B2 = torch.zeros(len(counts_BT), 2, dtype=torch.float64, device=logits_NV.device)
    return scores_B2.index_add_(0, rows_N, torch.stack([nats_N.double(), missed_N.double()], dim=1))


def _label_log_probabilities(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each label's log-probability, and whether another token has a higher one.

    V is this rank's shard; the results, (N,), are the same on all tensor-parallel ranks.
    """
    size = logits_NV.shape[1]
    local_N = labels_N - group.rank() * size
    is_local_N = (local_N >= 0) & (local_N < size)
    largest_N = logits_NV.amax(1)
    torch.distributed.all_reduce(largest_N, torch.distributed.ReduceOp.MAX, group=group)
    label_N = torch.where(
        is_local_N, logits_NV.gather(1, local_N.clamp(0, size - 1)[:, None])[:, 0], 0
    )
    sums_2N = torch.stack([(logits_NV - largest_N[:, None]).exp().sum(1), label_N])
    torch.distributed.all_reduce(sums_2N, group=group)
    total_N, label_N = sums_2N
    return label_N - largest_N - total_N.log(), label_N < largest_N


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    At temperature 0 it is the most likely token, otherwise a random one from the smallest set of
    tokens whose probabilities sum to at least top_p.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@torch.no_grad()
def generate(
    model: torch.nn.ModuleList,
    topology: Topology,
    prompts: list[np.ndarray],
    draws: np.ndarray,
    sampling: Sampling,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Continue a batch of prompts.

    Prompts of different lengths are processed together up to the shortest length, and from there
    one token at a time, so they should be sorted by length.

    Args:
        model: The virtual stages of this rank.
        topology: This rank's position in the parallel layout.
        prompts: Token ids of each prompt, the same on every rank of the model.
        draws: Uniform random numbers from [0, 1), (B, max_new_tokens), one for each new token; the
            same on every rank of the model.
        sampling: How tokens are chosen, and how many at most.
        ended: Returns whether a row with these new tokens ends before max_new_tokens.

    Returns:
        The new tokens of each prompt, on every rank of the model.

    Collective: every rank of a model replica must call this.
    """
    lengths = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((len(prompts), max(lengths) + sampling.max_new_tokens), np.int64)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    generated: list[list[int]] = [[] for _ in prompts]
    active_rows = set(range(len(prompts)))
    context_length = min(lengths)
    context = StaticInferenceContext(*tokens_BT.shape)
    input_BT = tokens_BT[:, :context_length]
    with _for_inference(model):
        while active_rows:
            token_indices = [min(len(row), sampling.max_new_tokens - 1) for row in generated]
            chosen_B = _next_tokens(
                model,
                topology,
                input_BT,
                context,
                draws[np.arange(len(draws)), token_indices],
                sampling,
            )
            for row in [row for row in active_rows if lengths[row] <= context_length]:
                tokens_BT[row, context_length] = chosen_B[row]
                generated[row].append(int(chosen_B[row]))
                if len(generated[row]) == sampling.max_new_tokens or ended(generated[row]):
                    active_rows.remove(row)
            input_BT = tokens_BT[:, context_length : context_length + 1]
            context_length = context_length + 1
    return generated


def _next_tokens(
    model,
    topology: Topology,
    tokens_BT: np.ndarray,
    context,
    uniforms_B: np.ndarray,
    sampling: Sampling,
) -> np.ndarray:
    """Append tokens to the context and return the next token of each row, (B,), on every rank."""
    group = unwrap_model(model[0]).pg_collection.pp
    logits_BV = _pipeline_forward(
        model, topology, torch.from_numpy(tokens_BT).to(topology.device), context, group
    )
    context.sequence_len_offset += tokens_BT.shape[1]
    chosen_B = torch.empty(len(tokens_BT), dtype=torch.int64, device=topology.device)
    if logits_BV is not None:
        chosen_B = _sample_tokens(
            logits_BV, torch.from_numpy(uniforms_B).to(topology.device), sampling
        )
    if group.size() > 1:
        torch.distributed.broadcast(
            chosen_B, torch.distributed.get_process_group_ranks(group)[-1], group=group
        )
    return chosen_B.cpu().numpy()


def _pipeline_forward(
    model, topology: Topology, tokens_BT: torch.Tensor, context, group
) -> torch.Tensor | None:
    """Run one batch through all pipeline stages, including virtual ones.

    Returns the logits of the next token, (B, V) over the whole vocabulary, on the last stage only.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    before, after = (ranks[(group.rank() + step) % len(ranks)] for step in (-1, 1))
    positions_BT = context.sequence_len_offset + torch.arange(
        tokens_BT.shape[1], device=tokens_BT.device
    ).expand_as(tokens_BT)
    for number, stage in enumerate(model):
        config = unwrap_model(stage).config
        if not unwrap_model(stage).pre_process:
            size = (tokens_BT.shape[1], len(tokens_BT), config.hidden_size)
            hidden_SBH = torch.empty(size, dtype=config.pipeline_dtype, device=tokens_BT.device)
            torch.distributed.recv(hidden_SBH, before, group=group)
            unwrap_model(stage).set_input_tensor(hidden_SBH)
        output = stage(
            tokens_BT,
            positions_BT,
            attention_mask=None,
            inference_context=context,
            output_processor=_last_logits,
        )
        if topology.is_last_stage and number == len(model) - 1:
            return output
        torch.distributed.send(output, after, group=group)
    return None


def _last_logits(*, hidden_states, output_layer, output_weight, **_rest) -> torch.Tensor:
    """Return the next token's logits over the whole vocabulary, (B, V)."""
    logits_BV = output_layer(hidden_states[-1:], weight=output_weight)[0][0].float().contiguous()
    parts = [torch.empty_like(logits_BV) for _ in range(output_layer.tp_group.size())]
    torch.distributed.all_gather(parts, logits_BV, group=output_layer.tp_group)
    return torch.cat(parts, dim=1)


def _sample_tokens(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """Return the next token of each row, (B,), by the sampling settings."""
    if not sampling.temperature:
        return logits_BV.argmax(1)
    probabilities_BV = (logits_BV.double() / sampling.temperature).softmax(1)
    sorted_BV, order_BV = probabilities_BV.sort(1, descending=True)
    excluded_BV = sorted_BV.cumsum(1) - sorted_BV >= sampling.top_p
    # Sample in vocabulary order: the order of the probabilities depends on their last bits, which
    # depend on the parallel layout.
    kept_BV = probabilities_BV.masked_fill(excluded_BV.scatter(1, order_BV, excluded_BV), 0)
    cumulative_BV = kept_BV.cumsum(1)
    return torch.searchsorted(
        cumulative_BV, uniforms_B[:, None] * cumulative_BV[:, -1:], right=True
    )[:, 0]


# Attributes of modules and configs that enable sequence parallelism, and attention in FP8, whose
# kernels take sequences of some lengths only.
_TRAINING_FLAGS = (
    "fp8_dot_product_attention",
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
    # Transformer Engine's, for sequence parallelism that overlaps with matrix products.
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
)


@contextlib.contextmanager
def _for_inference(model: torch.nn.ModuleList) -> Iterator[None]:
    """Disable dropout, sequence parallelism and attention in FP8 within the context.

    Sequence parallelism is disabled because a single next token cannot be split over
    tensor-parallel ranks. megatron-core's own switch identifies models by their address, which a
    later model may reuse.
    """
    parts = [
        part for stage in unwrap_model(list(model)) for part in (stage.config, *stage.modules())
    ]
    disabled = [
        (part, name)
        for part in parts
        for name in _TRAINING_FLAGS
        if getattr(part, name, False) is True
    ]
    training = model.training
    model.eval()
    for stage in model:
        # Weights have changed since Transformer Engine last quantized them.
        stage.set_is_first_microbatch()
    try:
        for part, name in disabled:
            setattr(part, name, False)
        yield
    finally:
        for part, name in disabled:
            setattr(part, name, True)
        model.train(training)
