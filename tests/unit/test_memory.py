"""Test the planned memory of a run on a GPU against measured peaks and counts by hand."""

from dataclasses import dataclass

import pytest

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.estimate.activations import PIECE
from retemper.pipeline.estimate.activations_te import APART_FROM_RANK, TransformerEngineActivations
from retemper.pipeline.estimate.memory import rank_memory

# The configuration of the benchmarks (benchmarks/): random weights, no evaluation, one GPU.
SEVEN_B = ["study=s", "name=n", "model=llama2_7b", "data=demo_code", "data.path=unmade"]
SEVEN_B += ["data.tokenizer=unread", "data.seq_length=4096", "train.tokens=1M"]
SEVEN_B += ["train.global_batch_size=16", "train.micro_batch_size=1"]
FULL = ["optimizer=lion", "optimizer.lr=1e-5"]
LORA = ["method=lora", "init_from=unread", "optimizer.lr=1e-4"]
LORA_PLAIN = [*LORA, "method.lora.kernel=plain"]
FP8 = ["precision=fp8_tensorwise"]
MICRO_BATCH_OF_TWO = ["train.micro_batch_size=2"]
BATCH_OF_EIGHT = ["train.global_batch_size=8"]
LORA_FP8 = [*LORA, *FP8, *BATCH_OF_EIGHT]
KEEP_TRANSPOSED = "fp8.keep_transposed=true"
FP8_ATTENTION = "fp8.attention=true"


@dataclass(frozen=True)
class Peak:
    """The torch.cuda.max_memory_allocated() of a run's start and whole training steps on an H200.

    Where the passes are recorded as a CUDA graph, the peak is during the recording. That is before
    the optimizer allocates its moments, which the plan includes: 0.3 GiB for LoRA.
    """

    overrides: list[str]
    gib: float
    commit: str
    # Whether the commit is older than the computation of a frozen head's loss in pieces.
    whole_logits: bool = False


FIRST_BENCHMARK = {"commit": "645f4c6", "whole_logits": True}
PEAKS = {
    "full bf16": Peak(FULL, 105.209, "645f4c6"),
    "full fp8": Peak([*FULL, *FP8], 115.000, "645f4c6"),
    "lora bf16": Peak(LORA_PLAIN, 30.318, **FIRST_BENCHMARK),
    "lora bf16, two": Peak([*LORA_PLAIN, *MICRO_BATCH_OF_TWO], 47.220, **FIRST_BENCHMARK),
    "lora fp8": Peak([*LORA_PLAIN, *FP8], 25.285, **FIRST_BENCHMARK),
    "lora fp8, two": Peak([*LORA_PLAIN, *FP8, *MICRO_BATCH_OF_TWO], 43.173, **FIRST_BENCHMARK),
    "lora bf16, plain": Peak([*LORA_PLAIN, *BATCH_OF_EIGHT], 29.779, "97556e7"),
    "lora fp8, plain": Peak([*LORA_PLAIN, *FP8, *BATCH_OF_EIGHT], 24.742, "97556e7"),
    "lora bf16, fused": Peak([*LORA, *BATCH_OF_EIGHT], 29.643, "9953758"),
    "lora bf16, fused, two": Peak([*LORA, *BATCH_OF_EIGHT, *MICRO_BATCH_OF_TWO], 45.861, "9953758"),
    "lora fp8, fused": Peak([*LORA_FP8], 23.608, "cad7ab4"),
    "lora fp8, kept": Peak([*LORA_FP8, KEEP_TRANSPOSED], 29.592, "6f6be28"),
    "lora fp8, kept, two": Peak(
        [*LORA_FP8, KEEP_TRANSPOSED, *MICRO_BATCH_OF_TWO], 45.817, "9953758"
    ),
    "lora fp8, attention": Peak([*LORA_FP8, FP8_ATTENTION], 22.629, "cad7ab4"),
    "lora fp8, all, two": Peak(
        [*LORA_FP8, KEEP_TRANSPOSED, FP8_ATTENTION, *MICRO_BATCH_OF_TWO], 43.814, "cad7ab4"
    ),
    "lora fp8, swiglu": Peak([*LORA_FP8, "parallel.recompute=swiglu"], 20.954, "cad7ab4"),
    "lora fp8, selective": Peak([*LORA_FP8, "parallel.recompute=selective"], 18.689, "9953758"),
    "lora fp8, q k v of documents": Peak(
        [*LORA_FP8, "method.lora.targets=[q,k,v]", "data.mask_documents=true", *MICRO_BATCH_OF_TWO],
        32.326,
        "9953758",
    ),
}


def bytes_of_whole_logits(activations: TransformerEngineActivations) -> int:
    """Return the bytes of a micro-batch's logits in 16 bits and of their softmax in float32."""
    return 6 * activations.tokens * activations.vocabulary


@pytest.mark.parametrize("peak", PEAKS.values(), ids=PEAKS)
def test_planned_peak_matches_the_measured_peak(peak, monkeypatch):
    if peak.whole_logits:
        monkeypatch.setattr(TransformerEngineActivations, "loss_by_pieces", bytes_of_whole_logits)
    planned = rank_memory(load_config([*SEVEN_B, *peak.overrides]), 0).total / 2**30
    assert planned == pytest.approx(peak.gib, rel=0.03)


def kept_activations(*overrides: str) -> float:
    """Return the size of the activations that a layer keeps for the backward pass.

    The unit is the size of a micro-batch's hidden states in 16 bits. Adapters have rank 1, so that
    they add almost nothing.
    """
    small = ["method.lora.rank=1"] if "method=lora" in overrides else []
    config = load_config([*SEVEN_B, *overrides, *small])
    of_layer, _recomputed = TransformerEngineActivations(config, 1).of_layer(0)
    return of_layer / (4096 * config.model.hidden_size * 2)


F = 11008 / 4096  # the feed-forward layer's width over the hidden state's
# The inputs of both norms; queries, keys and values; the output of attention; gate and up.
ALWAYS_KEPT = 2 + 3 + 1 + 2 * F


@pytest.mark.parametrize(
    ("overrides", "tensors"),
    [
        (FULL, ALWAYS_KEPT + 2 + F),  # the norms' outputs, and the input of down
        ([*FULL, *FP8], ALWAYS_KEPT + (3 + F) / 2),  # those and the input of o, in FP8
        ([*FULL, "precision=fp8_delayed"], ALWAYS_KEPT + (3 + F) / 2),
        ([*FULL, "precision=fp8_blockwise"], ALWAYS_KEPT + (3 + F) / 2 * (1 + 4 / 128)),
        ([*FULL, "precision=mxfp8"], ALWAYS_KEPT + (3 + F) / 2 * (1 + 1 / 32)),
        ([*FULL, *FP8, "fp8.bf16_layers=8"], ALWAYS_KEPT + (2 + F) / 2 + (3 + F) / 4),  # 16 of 32
        ([*FULL, *FP8, "fp8.attention=true"], ALWAYS_KEPT - 1.5 + (3 + F) / 2),
        ([*FULL, "precision=fp8_delayed", "fp8.attention=true"], ALWAYS_KEPT - 2 + (3 + F) / 2),
        (LORA_PLAIN, ALWAYS_KEPT + 2 + F),
        # FP8 copies of the norms' outputs, which nothing reads.
        ([*LORA_PLAIN, *FP8], ALWAYS_KEPT + 2 + F + 1),
        ([*LORA, *FP8], ALWAYS_KEPT + 2 + F),
        (LORA, ALWAYS_KEPT + 2 + F),
        ([*LORA, *FP8, "method.lora.targets=[q,k,v]"], ALWAYS_KEPT + 1),
        ([*LORA, "method.lora.targets=[down]"], ALWAYS_KEPT + F),
        ([*LORA, "method.lora.targets=[o]"], ALWAYS_KEPT),  # its input is the output of attention
        # The dropped-out input and the mask of the dropout.
        ([*LORA, "method.lora.targets=[o]", "method.lora.dropout=0.1"], ALWAYS_KEPT + 1.5),
        ([*LORA, "method.lora.targets=[q]", "method.lora.dropout=0.1"], ALWAYS_KEPT + 2.5),
        ([*LORA, *FP8, "method.lora.targets=[q]", "method.lora.dropout=0.1"], ALWAYS_KEPT + 2),
        ([*FULL, "model.qk_norm=true"], ALWAYS_KEPT + 2 + F + 2),
        ([*FULL, "parallel.recompute=full"], 1),
        ([*FULL, "parallel.recompute=selective"], 2 + 3 + 1 + 1),
        ([*LORA_PLAIN, "parallel.recompute=selective"], 2 + 3 + 1 + 1),
        ([*LORA, "parallel.recompute=selective"], 2 + 3 + 1 + 1 + 1),  # the norm is not fused
        ([*FULL, "parallel.context_parallel_size=2"], (ALWAYS_KEPT + 2 + F) / 2),
        ([*FULL, "parallel.tensor_parallel_size=2"], (ALWAYS_KEPT + 2 + F) / 2 + 2),
        (
            [*FULL, "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
            (ALWAYS_KEPT + 2 + F) / 2,
        ),
    ],
)
def test_activations_kept_by_a_layer_match_a_count_by_hand(overrides, tensors):
    # The tolerance covers what is not counted: the hidden states of the adapters, and one number
    # per token for each norm and for each attention head.
    assert kept_activations(*overrides) == pytest.approx(tensors, abs=0.06)


def test_grouped_query_attention_keeps_fewer_keys_and_values():
    """Check Llama-2-70B, which has 64 query heads and 8 heads of keys and values."""
    feed_forward = 28672 / 8192
    tensors = 2 + 1.25 + 1 + 2 + 3 * feed_forward
    assert kept_activations("model=llama2_70b", *FULL) == pytest.approx(tensors, abs=0.06)


# The number of weights in the linear layers of one transformer layer.
LINEAR_WEIGHTS = 4 * 4096**2 + 3 * 4096 * 11008


def test_transposed_copy_of_frozen_weights_takes_one_byte_per_weight():
    without = rank_memory(load_config([*SEVEN_B, *LORA, *FP8]), 0)
    with_copy = rank_memory(load_config([*SEVEN_B, *LORA, *FP8, KEEP_TRANSPOSED]), 0)
    assert with_copy.weights - without.weights == 32 * LINEAR_WEIGHTS


def test_fp8_weights_of_lora_are_initialized_in_bf16_first():
    """Check that the peak of LoRA in FP8 is at initialization if samples are short.

    The weights are drawn in bf16 beside those in FP8, which have one order of their elements.
    """
    base = 32 * (LINEAR_WEIGHTS + 2 * 4096) + 2 * 32000 * 4096 + 4096
    short = rank_memory(load_config([*SEVEN_B, *LORA, *FP8, "data.seq_length=1024"]), 0)
    assert short.total == 2 * base + 32 * LINEAR_WEIGHTS
    assert rank_memory(load_config([*SEVEN_B, *LORA, *FP8]), 0).activations > 0


def test_frozen_head_computes_logits_in_pieces():
    """Check a vocabulary of a million, whose whole logits take 33 GB per micro-batch."""
    large = rank_memory(load_config([*SEVEN_B, *LORA, "model.vocab_size=1048576"]), 0)
    assert large.temporary == pytest.approx(1024 * 1048576 * 4 + 2 * 4096 * 4096 * 2, rel=0.01)
    trained = rank_memory(load_config([*SEVEN_B, *FULL, "model.vocab_size=1048576"]), 0)
    assert trained.temporary > 4096 * 1048576 * 6


@pytest.mark.filterwarnings("ignore")  # of megatron-core's imports
def test_constants_of_the_plan_equal_those_of_the_model():
    """Check the constants that the plan repeats because it does not import torch."""
    prepare_megatron()
    from retemper.pipeline.model import adapted, frozen_head

    assert PIECE == frozen_head.PIECE
    assert APART_FROM_RANK == adapted._APART_FROM_RANK


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_waiting_micro_batches_multiply_activations_but_not_constants(stages):
    """Check the first stage of 1F1B, where as many micro-batches wait as there are stages."""
    overrides = [*SEVEN_B, *FULL, f"parallel.pipeline_parallel_size={stages}"]
    activations = TransformerEngineActivations(load_config(overrides), 1)
    of_layer, _recomputed = activations.of_layer(0)
    hidden = 4096 * 4096 * 2
    whole = stages * (32 // stages * of_layer + hidden)
    assert activations.moments(0)[0][0] == whole + activations.constant(0)
