"""Test the planned bytes of a run on a GPU, beside measured peaks and counts by hand."""

from dataclasses import dataclass

import pytest

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.estimate.activations import PIECE
from retemper.pipeline.estimate.activations_te import APART_FROM_RANK, TransformerEngineActivations
from retemper.pipeline.estimate.memory import rank_memory

# As the benches ask for (tests/bench): random weights, no evaluation, on one card.
SEVEN_B = ["study=s", "name=n", "model=llama2_7b", "data=demo_code", "data.path=unmade"]
SEVEN_B += ["data.tokenizer=unread", "data.seq_length=4096", "train.tokens=1M"]
SEVEN_B += ["train.global_batch_size=16", "train.micro_batch_size=1"]
FULL = ["optimizer=lion", "optimizer.lr=1e-5"]
LORA = ["method=lora", "init_from=unread", "optimizer.lr=1e-4"]
PLAIN = [*LORA, "method.lora.kernel=plain"]
FP8, TWO = ["precision=fp8_tensorwise"], ["train.micro_batch_size=2"]
OF_EIGHT, KEPT = ["train.global_batch_size=8"], "fp8.keep_transposed=true"


@dataclass(frozen=True)
class Peak:
    """The torch.cuda.max_memory_allocated() of a run's start and whole training steps on an H200.

    Passes that were recorded as a graph held the most while they were, before the optimizer made
    its moments: 0.3 GiB of LoRA's, which the plan has.
    """

    asked: list[str]
    gib: float
    commit: str
    whole_logits: bool = False  # before a frozen head's loss was computed by pieces


FIRST = {"commit": "645f4c6", "whole_logits": True}
PEAKS = {
    "full bf16": Peak(FULL, 105.209, "645f4c6"),
    "full fp8": Peak([*FULL, *FP8], 115.000, "645f4c6"),
    "lora bf16": Peak(PLAIN, 30.318, **FIRST),
    "lora bf16, two": Peak([*PLAIN, *TWO], 47.220, **FIRST),
    "lora fp8": Peak([*PLAIN, *FP8], 25.285, **FIRST),
    "lora fp8, two": Peak([*PLAIN, *FP8, *TWO], 43.173, **FIRST),
    "lora bf16, plain": Peak([*PLAIN, *OF_EIGHT], 29.779, "97556e7"),
    "lora fp8, plain": Peak([*PLAIN, *FP8, *OF_EIGHT], 24.742, "97556e7"),
    "lora bf16, fused": Peak([*LORA, *OF_EIGHT], 29.635, "6f6be28"),
    "lora fp8, fused": Peak([*LORA, *FP8, *OF_EIGHT], 24.614, "6f6be28"),
    "lora fp8, kept": Peak([*LORA, *FP8, *OF_EIGHT, KEPT], 29.592, "6f6be28"),
}


def of_whole_logits(activations: TransformerEngineActivations) -> int:
    """Return the bytes of all logits of a micro-batch.

    They are in 16 bits, and their softmax in float32.
    """
    return 6 * activations.tokens * activations.vocabulary


@pytest.mark.parametrize("peak", PEAKS.values(), ids=PEAKS)
def test_what_is_planned_is_what_was_measured(peak, monkeypatch):
    if peak.whole_logits:
        monkeypatch.setattr(TransformerEngineActivations, "loss_by_pieces", of_whole_logits)
    planned = rank_memory(load_config([*SEVEN_B, *peak.asked]), 0).total / 2**30
    assert planned == pytest.approx(peak.gib, rel=0.03)


def kept(*asked: str) -> float:
    """Return the activations that a layer keeps, with adapters of rank 1.

    The unit is the tensor of a micro-batch's hidden states in 16 bits.
    """
    small = ["method.lora.rank=1"] if "method=lora" in asked else []
    config = load_config([*SEVEN_B, *asked, *small])
    of_layer, _again = TransformerEngineActivations(config, 1).of_layer(0)
    return of_layer / (4096 * config.model.hidden_size * 2)


F = 11008 / 4096  # the feed-forward layer's width over the hidden state's
# What both norms read; queries, keys and values; attention's output; gate and up.
ALWAYS = 2 + 3 + 1 + 2 * F


@pytest.mark.parametrize(
    ("asked", "tensors"),
    [
        (FULL, ALWAYS + 2 + F),  # the norms' outputs, and what down reads
        ([*FULL, *FP8], ALWAYS + (3 + F) / 2),  # those, and what o reads, in FP8
        ([*FULL, "precision=fp8_delayed"], ALWAYS + (3 + F) / 2),
        ([*FULL, "precision=fp8_blockwise"], ALWAYS + (3 + F) / 2 * (1 + 4 / 128)),
        ([*FULL, "precision=mxfp8"], ALWAYS + (3 + F) / 2 * (1 + 1 / 32)),
        ([*FULL, *FP8, "fp8.bf16_layers=8"], ALWAYS + (2 + F) / 2 + (3 + F) / 4),  # 16 of 32
        ([*FULL, *FP8, "fp8.attention=true"], ALWAYS - 1.5 + (3 + F) / 2),
        ([*FULL, "precision=fp8_delayed", "fp8.attention=true"], ALWAYS - 2 + (3 + F) / 2),
        (PLAIN, ALWAYS + 2 + F),
        ([*PLAIN, *FP8], ALWAYS + 2 + F + 1),  # FP8 copies of the norms' outputs, never read
        ([*LORA, *FP8], ALWAYS + 2 + F),
        (LORA, ALWAYS + 2 + F),
        ([*LORA, *FP8, "method.lora.targets=[q,k,v]"], ALWAYS + 1),
        ([*LORA, "method.lora.targets=[down]"], ALWAYS + F),
        ([*LORA, "method.lora.targets=[o]"], ALWAYS),  # which reads attention's output
        ([*LORA, "method.lora.targets=[o]", "method.lora.dropout=0.1"], ALWAYS + 1.5),  # and a mask
        ([*LORA, "method.lora.targets=[q]", "method.lora.dropout=0.1"], ALWAYS + 2.5),
        ([*LORA, *FP8, "method.lora.targets=[q]", "method.lora.dropout=0.1"], ALWAYS + 2),
        ([*FULL, "model.qk_norm=true"], ALWAYS + 2 + F + 2),
        ([*FULL, "parallel.recompute=full"], 1),
        ([*FULL, "parallel.recompute=selective"], 2 + 3 + 1 + 1),
        ([*PLAIN, "parallel.recompute=selective"], 2 + 3 + 1 + 1),
        ([*LORA, "parallel.recompute=selective"], 2 + 3 + 1 + 1 + 1),  # the norm stands apart
        ([*FULL, "parallel.context_parallel_size=2"], (ALWAYS + 2 + F) / 2),
        ([*FULL, "parallel.tensor_parallel_size=2"], (ALWAYS + 2 + F) / 2 + 2),
        (
            [*FULL, "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
            (ALWAYS + 2 + F) / 2,
        ),
    ],
)
def test_what_a_layer_keeps_is_the_count_by_hand(asked, tensors):
    # Beside these each token has hidden states of adapters, and a number a norm and a head.
    assert kept(*asked) == pytest.approx(tensors, abs=0.06)


def test_keys_and_values_of_query_groups_are_fewer():
    """Check Llama-2-70B, which has 8 heads of keys and values beside 64 of queries."""
    feed_forward = 28672 / 8192
    tensors = 2 + 1.25 + 1 + 2 + 3 * feed_forward
    assert kept("model=llama2_70b", *FULL) == pytest.approx(tensors, abs=0.06)


# Weights of a layer's linear layers.
LINEAR = 4 * 4096**2 + 3 * 4096 * 11008


def test_a_transposed_copy_of_frozen_weights_is_one_byte_a_weight():
    without = rank_memory(load_config([*SEVEN_B, *LORA, *FP8]), 0)
    with_copy = rank_memory(load_config([*SEVEN_B, *LORA, *FP8, KEPT]), 0)
    assert with_copy.weights - without.weights == 32 * LINEAR


def test_weights_that_are_held_in_fp8_are_drawn_in_bf16_first():
    """Check the peak that was measured for the fused LoRA in FP8.

    It is more than that of a step.
    """
    base = 32 * (LINEAR + 2 * 4096) + 2 * 32000 * 4096 + 4096
    planned = rank_memory(load_config([*SEVEN_B, *LORA, *FP8]), 0)
    assert planned.total == 2 * base + 32 * 2 * LINEAR
    assert planned.total / 2**30 == pytest.approx(24.614, abs=0.001)
    assert rank_memory(load_config([*SEVEN_B, *LORA, *FP8, *TWO]), 0).activations > 0


def test_a_frozen_heads_logits_are_a_pieces():
    """Check a vocabulary of a million.

    Whole logits would not fit: 33 GB a micro-batch.
    """
    large = rank_memory(load_config([*SEVEN_B, *LORA, "model.vocab_size=1048576"]), 0)
    assert large.temporary == pytest.approx(1024 * 1048576 * 4 + 2 * 4096 * 4096 * 2, rel=0.01)
    trained = rank_memory(load_config([*SEVEN_B, *FULL, "model.vocab_size=1048576"]), 0)
    assert trained.temporary > 4096 * 1048576 * 6


@pytest.mark.filterwarnings("ignore")  # of megatron-core's imports
def test_what_a_plan_says_of_the_model_is_the_models():
    """Check the plan's own constants, which it has because it does not import torch."""
    prepare_megatron()
    from retemper.pipeline.model import adapted, frozen_head

    assert PIECE == frozen_head.PIECE
    assert APART_FROM_RANK == adapted._APART_FROM_RANK


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_waiting_micro_batches_hold_activations_but_constants_once(stages):
    """Check 1F1B's first stage, which has as many micro-batches waiting as there are stages."""
    asked = [*SEVEN_B, *FULL, f"parallel.pipeline_parallel_size={stages}"]
    activations = TransformerEngineActivations(load_config(asked), 1)
    (of_layer, _again), hidden = activations.of_layer(0), 4096 * 4096 * 2
    whole = stages * (32 // stages * of_layer + hidden)
    assert activations.moments(0)[0][0] == whole + activations.constant(0)
