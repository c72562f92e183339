"""Check the loss of a frozen output layer in running models, one rank's part of each.

Run by conftest.launch. A case: {"overrides": [...], "piece": tokens of a piece}. Raises
AssertionError where something is wrong.
"""

import math
from unittest import mock

import torch
from probes import Operations, batch_of, samples_of

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology
from retemper.pipeline.distributed.seeds import seed_step


def main(cases: list[dict]) -> None:
    from retemper.pipeline.model import frozen_head

    for case in cases:
        config = load_config(case["overrides"])
        place = topology.start(config.parallel)
        seed_step(config.seed, 0, place)
        with mock.patch.object(frozen_head, "PIECE", case["piece"]):
            equal(config, place)
        topology.stop(leave=False)


def equal(config, place) -> None:
    """Check that a step by pieces has the losses and gradients of one with whole logits.

    It computes no whole logits; scoring has the same losses.
    """
    from retemper.pipeline.model import frozen_head
    from retemper.pipeline.model.build import build_model

    model = build_model(config, place)
    generator = torch.Generator().manual_seed(1)  # for each rank the same: some hold the same
    for parameter in model.parameters():
        if parameter.requires_grad:  # B begins at zero, and A's gradient with it
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    samples = samples_of(config)
    samples.tokens_NT[:] %= config.model.vocab_size
    context = (place.context_parallel_rank, config.parallel.context_parallel_size)
    batch = batch_of(config, samples).shard_for_context_parallel(*context)
    with mock.patch.object(frozen_head, "is_frozen", lambda _stage: False):
        with Operations() as whole:
            expected = stepped(model, batch)
    with Operations() as by_pieces:
        got = stepped(model, batch)
    scored = scoring(model, batch)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        off = ((got[name] - value).norm() / value.norm()).item()
        assert off <= 2e-6, f"{name}: {off}"
    if not place.is_last_stage:
        return
    assert "losses" in expected
    assert scored.equal(got["losses"])
    tokens = batch.labels_BT.numel()
    shard = config.padded_vocab_size // config.parallel.tensor_parallel_size
    assert tokens > frozen_head.PIECE
    assert logits_in(whole, tokens, shard)
    assert logits_in(by_pieces, tokens, shard) == []
    assert by_pieces.count("::mm", {(frozen_head.PIECE, shard)}) == tokens // frozen_head.PIECE


def logits_in(operations: Operations, tokens: int, shard: int) -> list[tuple[str, tuple[int, ...]]]:
    """The operations that gave a number for each token and each row of this rank's shard."""
    return [
        (name, shape)
        for name, shape in operations.seen
        if shape and shape[-1] == shard and math.prod(shape) >= tokens * shard
    ]


def stepped(model, batch) -> dict[str, torch.Tensor]:
    """Return the losses, on the last stage, and the gradients of all trainable parameters."""
    from retemper.pipeline.model.forward import run_schedule

    for stage in model:
        stage.zero_grad_buffer()
    outputs = run_schedule(model, [batch], forward_only=False)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    gradients = {name: parameter.main_grad.clone() for name, parameter in trained.items()}
    return gradients | ({"losses": outputs[0]["losses_BT"]} if outputs else {})


@torch.no_grad()
def scoring(model, batch) -> torch.Tensor | None:
    from retemper.pipeline.model.forward import run_schedule

    outputs = run_schedule(model, [batch], forward_only=True)
    return outputs[0]["losses_BT"] if outputs else None
