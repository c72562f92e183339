"""Test model FLOPs against counts by hand, and the peak FLOPs per second of GPUs."""

import pytest
import yaml
from conftest import ROOT

from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.gpus import peak_flops
from retemper.pipeline.schema.model import LoraConfig, ModelConfig

LLAMA2_7B = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / "llama2_7b.yaml").read_text()))
RANK_16 = LoraConfig(rank=16, alpha=32.0, targets="all")


def test_full_training_of_llama2_7b_matches_a_count_by_hand():
    attention_matrices = 4 * 4096 * 4096  # q, k, v, o
    ffn_matrices = 3 * 4096 * 11008  # gate, up, down
    # A token attends to half of 4096 keys on average, once for scores and once for values:
    # 2 × 1/2 × 4096 keys × 4096 features.
    causal_attention = 4096 * 4096
    head = 4096 * 32000
    forward = 2 * (32 * (attention_matrices + ffn_matrices + causal_attention) + head)
    assert flops_per_token(LLAMA2_7B, None, 4096) == 3 * forward == 42_863_689_728
    # Six operations for each of the 6.6B weights of matrix products, and attention.
    assert 3 * forward == 6 * 6_607_077_376 + 6 * 32 * 4096 * 4096


def test_lora_training_of_llama2_7b_matches_a_count_by_hand():
    q_k_v = 3 * 4096 * 4096
    o = 4096 * 4096
    ffn = 3 * 4096 * 11008
    attention = 4096 * 4096
    head = 4096 * 32000
    lora_a = 16 * (3 * 4096 + 4096 + 2 * 4096 + 11008)
    lora_b = 16 * (3 * 4096 + 4096 + 2 * 11008 + 4096)
    # Nothing is trained below the first layer, so the gradient of its input is not computed.
    frozen = 32 * (q_k_v + o + ffn) * 2 + head * 2 - q_k_v
    adapters = 32 * 3 * (lora_a + lora_b) - 16 * 3 * 4096
    assert (
        flops_per_token(LLAMA2_7B, RANK_16, 4096)
        == 2 * (frozen + adapters + 32 * 3 * attention)
        == 29_788_340_224
    )


def test_no_gradients_are_counted_below_the_first_trainable_weight():
    model = LLAMA2_7B.model_copy(update={"num_layers": 1})
    only_down = RANK_16.model_copy(update={"targets": ["down"]})
    forward = 4 * 4096 * 4096 + 4096 * 4096 + 3 * 4096 * 11008
    # The gradient of the adapter's input is not needed.
    adapter = 16 * (2 * 11008 + 3 * 4096)
    assert flops_per_token(model, only_down, 4096) == 2 * (forward + adapter + 2 * 4096 * 32000)


def test_query_groups_and_the_size_of_heads_change_the_count():
    model = LLAMA2_7B.model_copy(update={"num_query_groups": 8, "head_size": 64})
    q_and_o = 2 * 4096 * 2048
    k_and_v = 2 * (4096 * 4096 - 4096 * 512)
    attention = 4096 * 2048
    saved = q_and_o + k_and_v + attention
    assert (
        flops_per_token(LLAMA2_7B, None, 4096) - flops_per_token(model, None, 4096)
        == 6 * 32 * saved
    )


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8_delayed", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA B200", "mxfp8", 4500e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8_tensorwise", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        (None, "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(gpu, precision, peak):
    assert peak_flops(gpu, precision) == peak
