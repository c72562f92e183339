"""Test what is read from config.json: the files of the hub's checkpoints, and others' mistakes."""

import json
from pathlib import Path

import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface.source_config import (
    config_of,
    model_of,
    passed_over,
    readable_config,
)
from retemper.pipeline.schema.model import RopeScaling

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
# What transformers itself has written into nearly every folder, by version.
USUAL = {
    "_name_or_path": "somewhere",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "attention_bias": False}
LLAMA31 |= {"attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1}
LLAMA31 |= {"eos_token_id": [128001, 128008, 128009]}
QWEN2 = {"attention_dropout": 0.0, "max_window_layers": 21, "rope_theta": 1000000.0}
QWEN2 |= {"sliding_window": 128, "use_sliding_window": False}
QWEN3 = QWEN2 | {"attention_bias": False, "head_dim": 128, "rope_scaling": None}
QWEN3 |= {"sliding_window": None}
MISTRAL = {"rope_theta": 10000.0, "sliding_window": 4096}
NEW = {"rope_theta": 1000000.0, "rope_type": "default"}

# The keys of the config.json of much-used checkpoints and fine-tunes, beside the usual ones.
CHECKPOINTS: dict[str, dict[str, dict]] = {
    "Llama": {
        "Llama-2-7b-hf": {"pretraining_tp": 1, "rope_scaling": None},
        "Llama-2-70b-chat-hf": {"pretraining_tp": 1, "rope_scaling": None},
        "llama-7b": {"max_sequence_length": 2048, "pad_token_id": 0},
        "llama-7b of 2023": {"pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1},
        "Meta-Llama-3-8B": {"attention_bias": False, "attention_dropout": 0.0,
                            "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 500000.0},
        "Llama-3.1-8B-Instruct": LLAMA31,
        "Llama-3.2-1B": LLAMA31 | {"head_dim": 64, "tie_word_embeddings": True,
                                   "rope_scaling": LLAMA3 | {"factor": 32.0}},
        "Llama-3.3-70B-Instruct": LLAMA31 | {"head_dim": 128},
        "unsloth/Llama-3.2-1B-Instruct": LLAMA31 | {"unsloth_fixed": True, "pad_token_id": 4,
                                                    "unsloth_version": "2024.12.4"},
        "DeepSeek-R1-Distill-Llama-8B": LLAMA31,
        "Hermes-3-Llama-3.1-8B": LLAMA31 | {"use_cache": False},
        "TinyLlama-1.1B-Chat-v1.0": {"attention_bias": False, "pretraining_tp": 1,
                                     "rope_scaling": None, "rope_theta": 10000.0},
        "vicuna-7b-v1.5-16k": {"max_sequence_length": 16384, "pretraining_tp": 1,
                               "rope_scaling": {"factor": 4.0, "type": "linear"}},
        "CodeLlama-7b-hf": {"rope_theta": 1000000, "pretraining_tp": 1, "rope_scaling": None},
        "deepseek-coder-6.7b-base": {"rope_scaling": {"factor": 4.0, "type": "linear"},
                                     "rope_theta": 100000, "pretraining_tp": 1},
        "Yi-1.5-9B": {"pad_token_id": 0, "rope_theta": 5000000.0, "attention_bias": False},
        "SmolLM2-135M": {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
                         "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
                         "tie_word_embeddings": True},
        "Falcon3-7B-Base": {"head_dim": 256, "rope_theta": 1000042, "attention_bias": False},
        "open_llama_3b": {"pad_token_id": 0},
        "CLEX-LLaMA-4K without its scaling": {"log_scale": False, "use_flashattn": True},
        "saved by transformers 4.48": {"_attn_implementation_autoset": True},
        "saved by transformers 5": {"rope_parameters": NEW | LLAMA3, "dtype": "bfloat16"},
    },
    "Mistral": {
        "Mistral-7B-v0.1": MISTRAL,
        "Mistral-7B-Instruct-v0.2": {"rope_theta": 1000000.0, "sliding_window": None,
                                     "attention_dropout": 0.0},
        "Mistral-Nemo-Base-2407": {"head_dim": 128, "rope_theta": 1000000.0,
                                   "sliding_window": None, "attention_dropout": 0.0},
        "Mistral-Small-24B-Base-2501": {"head_dim": 128, "rope_theta": 100000000.0,
                                        "sliding_window": None},
        "Ministral-8B-Instruct-2410": {"head_dim": 128, "sliding_window": 32768,
                                       "rope_theta": 100000000.0},
        "zephyr-7b-beta": MISTRAL | {"pad_token_id": 2, "use_cache": True},
        "OpenHermes-2.5-Mistral-7B": MISTRAL | {"use_cache": False},
        "unsloth/mistral-7b-v0.3": {"rope_theta": 1000000.0, "sliding_window": None,
                                    "unsloth_version": "2024.9", "pad_token_id": 4},
        "with FlashAttention, transformers 4.35": MISTRAL | {"_flash_attn_2_enabled": True},
        "saved by transformers 5": {"sliding_window": None, "rope_parameters": NEW,
                                    "dtype": "bfloat16"},
    },
    "Qwen2": {
        "Qwen1.5-0.5B": QWEN2 | {"tie_word_embeddings": True},
        "Qwen2-7B-Instruct": QWEN2,
        "Qwen2.5-0.5B": QWEN2 | {"use_mrope": False},
        "Qwen2.5-Math-7B": QWEN2 | {"use_mrope": False, "rope_theta": 10000},
        "Qwen2.5-Coder-32B-Instruct": QWEN2,
        "QwQ-32B": QWEN2 | {"pad_token_id": 4},
        "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2 | {"use_mrope": False, "rope_theta": 10000},
        "trained by verl": QWEN2 | {"use_mrope": False, "rope_scaling": None, "pad_token_id": 4,
                                    "sliding_window": None, "_attn_implementation_autoset": True},
        "unsloth/Qwen2.5-7B": QWEN2 | {"unsloth_fixed": True, "rope_scaling": None},
        "with biases of attention": QWEN2 | {"attention_bias": True},
        "saved by transformers 5": {"layer_types": ["full_attention"] * 2, "use_mrope": False,
                                    "rope_parameters": NEW, "max_window_layers": 28,
                                    "sliding_window": None, "use_sliding_window": False},
        "saved by 5, by layer type": {"rope_parameters": {"full_attention": NEW,
                                                          "sliding_attention": None},
                                      "layer_types": ["full_attention"] * 2},
    },
    "Qwen3": {
        "Qwen3-0.6B": QWEN3 | {"tie_word_embeddings": True},
        "Qwen3-8B": QWEN3,
        "Qwen3-4B-Instruct-2507": QWEN3 | {"rope_theta": 5000000},
        "Qwen3-Embedding-0.6B": QWEN3,
        "unsloth/Qwen3-4B": QWEN3 | {"unsloth_fixed": True, "pad_token_id": 4},
        "saved by transformers 4.56": QWEN3 | {"dtype": "bfloat16",
                                               "layer_types": ["full_attention"] * 2},
        "saved by transformers 5": {"rope_parameters": NEW, "head_dim": 128,
                                    "layer_types": ["full_attention"] * 2},
    },
}  # fmt: skip


def config(family: str = "Llama", **changes) -> dict:
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    return names | SHAPE | USUAL | changes


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, of in CHECKPOINTS.items() for name in of]
)
def test_a_checkpoint_of_the_hub_is_read_as_transformers_reads_it(family, name):
    import transformers

    written = config(family, **CHECKPOINTS[family][name])
    model = model_of(written, Path("m"))
    theirs = transformers.AutoConfig.for_model(**written)
    rope = written.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    assert model.rotary_base == rope.get("rope_theta", theirs.rope_theta)
    assert model.num_query_groups == theirs.num_key_value_heads
    assert model.kv_channels == (getattr(theirs, "head_dim", None) or 16)
    assert model.tie_embeddings == theirs.tie_word_embeddings
    scaling = rope if "factor" in rope else getattr(theirs, "rope_scaling", None)
    assert (model.rope_scaling and model.rope_scaling.factor) == (scaling and scaling["factor"])


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("Llama", {"rope_scaling": {"type": "yarn", "factor": 16.0}}, "of type 'yarn'"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, "mlp_bias=True"),  # granite-code
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("Llama", {"partial_rotary_factor": False}, "partial_rotary_factor=False"),
        ("Llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("Llama", {"log_scale": True}, "log_scale=True"),
        ("Llama", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ("Llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("Llama", {"norm_type": "layernorm"}, "norm_type='layernorm'"),
        ("Llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("Llama", {"compression_config": {"format": "pack"}}, "compression_config="),
        ("Llama", {"transformers_weights": "other.safetensors"}, "transformers_weights="),
        ("Mistral", {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ("Mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("Qwen2", QWEN2 | {"is_causal": False}, "is_causal=False"),  # gte-Qwen2-1.5B-instruct
        ("Qwen2", QWEN2 | {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_"),
        ("Qwen2", QWEN2 | {"use_mrope": True}, "use_mrope=True"),
        ("Qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, "of type 'mrope'"),
        ("Qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types with 'chunked_"),
        ("Qwen2", {"layer_types": ["full_attention"]}, "layer_types="),
        ("Qwen2", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        ("Qwen3", {"rope_scaling": {"rope_type": "yarn", "attn_factor": 0.8}}, "of type 'yarn'"),
        # what a file contradicts itself in
        ("Llama", {"rope_theta": 1e4, "rope_parameters": NEW}, "but rope_theta=10000.0"),
        ("Llama", {"rope_parameters": NEW, "rope_scaling": LLAMA3}, "rope_scaling.rope_type="),
        ("Llama", {"rope_scaling": LLAMA3 | {"type": "linear"}}, "rope_scaling.type='linear'"),
        ("Llama", {"rope_scaling": NEW | {"factor": 2.0}}, "rope_scaling.factor=2.0"),
        (
            "Qwen2",
            {"rope_parameters": {"a": NEW, "b": NEW | {"rope_theta": 5.0}}},
            "rope_parameters.b.rope_theta=5.0",
        ),
        ("Qwen2", {"rope_parameters": {"full_attention": None, "b": NEW}}, "full_attention=None"),
        ("Llama", {"model_type": "mistral"}, "contradict each other"),
        ("Llama", {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "architectures="),
        ("Llama", {"pad_token_id": 300}, "pad_token_id=300, but vocab_size=300"),
        # values of another kind
        ("Llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ("Llama", {"rope_parameters": [NEW]}, "rope_parameters=["),
        ("Llama", {"rope_scaling": {"type": ["linear"]}}, "rope_scaling of type"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": None}}, "without factor"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor='4'"),
        ("Llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ("Llama", {"rope_theta": "1e6"}, "rope_theta='1e6'"),
        ("Llama", {"rope_theta": 0}, "rope_theta=0"),
        ("Llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ("Llama", {"rms_norm_eps": None}, "no rms_norm_eps"),
        ("Llama", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ("Llama", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ("Llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ("Llama", {"hidden_act": None}, "hidden_act=None"),
        ("Llama", {"layer_types": 5}, "layer_types=5"),
        ("Llama", {"architectures": "GPT2LMHeadModel"}, "the architecture GPT2LMHeadModel"),
        ("Llama", {"architectures": [None]}, "the architecture None"),
    ],
)
def test_a_model_that_is_not_the_plain_one_is_refused_by_its_key(family, changes, named):
    with pytest.raises(UserError) as refusal:
        model_of(config(family, **changes), Path("m"))
    assert named in str(refusal.value)


def test_absent_keys_have_the_defaults_of_their_family():
    import transformers

    for family in CHECKPOINTS:
        plain = config(family, num_attention_heads=32)
        del plain["num_key_value_heads"]
        theirs = transformers.AutoConfig.for_model(**plain)
        model = model_of(plain, Path("m"))
        assert model.num_query_groups == theirs.num_key_value_heads
        assert model.kv_channels == (getattr(theirs, "head_dim", None) or 2)
        assert model.max_sequence_length == min(256, getattr(theirs, "sliding_window", 0) or 256)


def test_the_architecture_is_found_by_either_name():
    for changes in (
        {"architectures": None},
        {"model_type": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
        {"hidden_act": "swish"},
    ):
        assert model_of(config(**changes), Path("m")) == model_of(config(), Path("m"))


def test_everything_that_transformers_writes_is_passed_over():
    import transformers

    for family in CHECKPOINTS:
        made = transformers.AutoConfig.for_model(family.lower(), **SHAPE)
        written = json.loads(made.to_json_string(use_diff=False)) | config(family)
        model_of(written, Path("m"))
        assert {"temperature", "num_beams", "is_decoder"} <= set(passed_over(written))
        assert not set(passed_over(written)) & config(family).keys()


def test_an_empty_quantization_config_which_transformers_fails_at_is_left_out(tmp_path):
    for empty in (None, {}):
        written = config(quantization_config=empty, unsloth_fixed=True)
        (tmp_path / "config.json").write_text(json.dumps(written))
        readable = readable_config(tmp_path)
        assert "quantization_config" not in readable
        assert readable["unsloth_fixed"]


def test_both_spellings_of_an_export_mean_the_same(tmp_path):
    new = config(rope_parameters=NEW | LLAMA3, dtype="bfloat16")
    del new["torch_dtype"]
    old = config(rope_theta=1000000.0, rope_scaling=LLAMA3)
    for written in (new, old):
        (tmp_path / "config.json").write_text(json.dumps(written))
        both = readable_config(tmp_path)
        assert both["rope_parameters"] == NEW | LLAMA3
        assert (both["rope_theta"], both["rope_scaling"]) == (1000000.0, LLAMA3)
        assert both["dtype"] == both["torch_dtype"] == "bfloat16"
    model = model_of(new, tmp_path)
    assert model == model_of(old, tmp_path)
    assert model.rope_scaling == RopeScaling(kind="llama3", factor=8.0)
    assert config_of(model, "bfloat16") == config_of(model, "bfloat16") | {
        key: both[key] for key in ("rope_parameters", "rope_theta", "rope_scaling", "dtype")
    }
