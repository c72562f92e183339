"""What a sharded model says of text: log-likelihoods of continuations, and continuations of its own. Every rank of a model calls both.

The vocabulary stays in its shards: log-likelihoods come from sums over them, and of the logits only those of the next token are
gathered. Keys and values are kept by megatron-core's static inference context, in which all rows of a batch stand at the same place.

Shapes: B batch, T sequence length, S sequence as layers see it, H hidden size, N chosen positions, V vocabulary (this rank's shard
where said).
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
from retemper.pipeline.model.forward import through_stages


@torch.no_grad()
def log_likelihoods(model: torch.nn.ModuleList, batches: list[Batch]) -> list[torch.Tensor]:
    """Of each micro-batch, on the last pipeline stage alone, (B, 2) float64: the log-likelihood in nats of each row's labels that count,
    and how many of them are not what the model holds most likely. Of what this context-parallel rank holds of the sequences.

    The micro-batches are of one size.
    """
    with _for_inference(model):
        return through_stages(model, batches, _scoring_step, forward_only=True)


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
    counts_BT = batch.loss_mask_BT > 0
    # Logits of what counts alone: of a question with its examples that is one token in a hundred.
    logits_NV = output_layer(
        hidden_states.transpose(0, 1)[counts_BT].unsqueeze(0), weight=output_weight
    )[0][0].float()
    nats_N, missed_N = _of_labels(logits_NV, batch.labels_BT[counts_BT], group)
    rows_N = counts_BT.nonzero()[:, 0]
    scores_B2 = torch.zeros(len(counts_BT), 2, dtype=torch.float64, device=logits_NV.device)
    return scores_B2.index_add_(0, rows_N, torch.stack([nats_N.double(), missed_N.double()], dim=1))


def _of_labels(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and whether another token has a larger one; V is this rank's shard."""
    size = logits_NV.shape[1]
    local_N = labels_N - group.rank() * size
    here_N = (local_N >= 0) & (local_N < size)
    largest_N = logits_NV.amax(1)
    torch.distributed.all_reduce(largest_N, torch.distributed.ReduceOp.MAX, group=group)
    own_N = torch.where(here_N, logits_NV.gather(1, local_N.clamp(0, size - 1)[:, None])[:, 0], 0)
    sums_2N = torch.stack([(logits_NV - largest_N[:, None]).exp().sum(1), own_N])
    torch.distributed.all_reduce(sums_2N, group=group)
    total_N, own_N = sums_2N
    return own_N - largest_N - total_N.log(), own_N < largest_N


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else one drawn from the least set of tokens that holds top_p."""

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
    """Continue a batch of prompts, token ids each, until `ended` says so of the new tokens or there are max_new_tokens of them.

    draws: (B, max_new_tokens) from [0, 1), what each new token is drawn with; the same on every rank of the model, as prompts are.
    Prompts of unlike length are read together as far as the shortest goes, and from there a token at a time: sort them.
    """
    lengths = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((len(prompts), max(lengths) + sampling.max_new_tokens), np.int64)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    read = min(lengths)
    context = StaticInferenceContext(*tokens_BT.shape)
    fresh_BT = tokens_BT[:, :read]
    with _for_inference(model):
        while open_rows:
            places = [min(len(row), sampling.max_new_tokens - 1) for row in new]
            chosen_B = _next_tokens(
                model, topology, fresh_BT, context, draws[np.arange(len(draws)), places], sampling
            )
            for row in [row for row in open_rows if lengths[row] <= read]:
                tokens_BT[row, read] = chosen_B[row]
                new[row].append(int(chosen_B[row]))
                if len(new[row]) == sampling.max_new_tokens or ended(new[row]):
                    open_rows.remove(row)
            fresh_BT = tokens_BT[:, read : read + 1]
            read = read + 1
    return new


def _next_tokens(
    model,
    topology: Topology,
    tokens_BT: np.ndarray,
    context,
    draws_B: np.ndarray,
    sampling: Sampling,
) -> np.ndarray:
    """Read tokens behind those that the context holds; what comes next, (B,) on every rank."""
    group = unwrap_model(model[0]).pg_collection.pp
    logits_BV = _through_ring(
        model, topology, torch.from_numpy(tokens_BT).to(topology.device), context, group
    )
    context.sequence_len_offset += tokens_BT.shape[1]
    chosen_B = torch.empty(len(tokens_BT), dtype=torch.int64, device=topology.device)
    if logits_BV is not None:
        chosen_B = _choose(logits_BV, torch.from_numpy(draws_B).to(topology.device), sampling)
    if group.size() > 1:
        torch.distributed.broadcast(
            chosen_B, torch.distributed.get_process_group_ranks(group)[-1], group=group
        )
    return chosen_B.cpu().numpy()


def _through_ring(
    model, topology: Topology, tokens_BT: torch.Tensor, context, group
) -> torch.Tensor | None:
    """One batch through the pipeline's stages, which virtual ones go round more than once. The next token's logits, on the last."""
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
    """The next token's logits over the whole vocabulary, (B, V)."""
    logits_BV = output_layer(hidden_states[-1:], weight=output_weight)[0][0].float().contiguous()
    parts = [torch.empty_like(logits_BV) for _ in range(output_layer.tp_group.size())]
    torch.distributed.all_gather(parts, logits_BV, group=output_layer.tp_group)
    return torch.cat(parts, dim=1)


def _choose(logits_BV: torch.Tensor, draws_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if not sampling.temperature:
        return logits_BV.argmax(1)
    shares_BV = (logits_BV.double() / sampling.temperature).softmax(1)
    sorted_BV, order_BV = shares_BV.sort(1, descending=True)
    beyond_BV = sorted_BV.cumsum(1) - sorted_BV >= sampling.top_p
    # Drawn in the vocabulary's order: that of the shares changes with the last bits, which change with the layout.
    kept_BV = shares_BV.masked_fill(beyond_BV.scatter(1, order_BV, beyond_BV), 0)
    reached_BV = kept_BV.cumsum(1)
    return torch.searchsorted(reached_BV, draws_B[:, None] * reached_BV[:, -1:], right=True)[:, 0]


_SHARED_SEQUENCE = (
    "sequence_parallel",
    "scatter_to_sequence_parallel",
    "reduce_scatter_embeddings",
)
_SHARED_SEQUENCE += (
    "ub_overlap_ag_fprop",
    "ub_overlap_rs_fprop",
)  # Transformer Engine's, when it hides that behind multiplications


@contextlib.contextmanager
def _for_inference(model: torch.nn.ModuleList) -> Iterator[None]:
    """Within it nothing is dropped out, and tensor-parallel ranks do not share the sequence: a single next token cannot be parted.

    megatron-core's own switch remembers models by their address, which the next model may have.
    """
    parts = [
        part for stage in unwrap_model(list(model)) for part in (stage.config, *stage.modules())
    ]
    switched = [
        (part, name)
        for part in parts
        for name in _SHARED_SEQUENCE
        if getattr(part, name, False) is True
    ]
    training = model.training
    model.eval()
    for stage in model:
        stage.set_is_first_microbatch()  # weights have changed since Transformer Engine last made FP8 ones of them
    try:
        for part, name in switched:
            setattr(part, name, False)
        yield
    finally:
        for part, name in switched:
            setattr(part, name, True)
        model.train(training)
