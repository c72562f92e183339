"""Convert between config.json of a transformers folder and the model config.

Every unsupported option in config.json is refused and named.
"""

import json
from pathlib import Path
from typing import Any

from retemper.pipeline.corpus.tokenizer import fetched, is_hub_name
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelConfig, RopeScaling

# Architecture -> the options of ModelConfig that it implies.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}

# Keys without effect on training; source_folder.py refuses the code that auto_map names.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "max_window_layers", "model_type", "pad_token_id", "pretraining_tp",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
# Keys that are read, and below keys of which a single value is supported.
_READ = {
    "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
}  # fmt: skip
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "quantization_config": None,
}


# The weights to download from a hub repository; the second if it has none of the first.
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


def transformers_folder(name: str, given: str) -> Path:
    """Return a folder unchanged, or for a hub name the folder of its downloaded files.

    Args:
        name: a folder, or a hub name: owner/name or owner/name@revision.
        given: the name as the user wrote it, for the message of UserError.
    """
    if Path(name).exists() or not is_hub_name(name):
        return Path(name)
    small_files = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    folder = fetched(name, (*small_files, *_SAFETENSORS), given)
    if not any(folder.glob("*.safetensors")):
        folder = fetched(name, (*small_files, *_PICKLED), given)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no transformers folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged (no dictionary); download it again")
    return config


def model_of(config: dict[str, Any], source: Path) -> ModelConfig:
    """Return the model that config.json describes.

    Raises:
        UserError: the architecture or an option is not supported, or a key is missing or invalid.
    """
    (architecture,) = config.get("architectures") or ["none named"]
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{source}/config.json: the architecture {architecture} is not supported; "
            f"there are {', '.join(_ARCHITECTURES)}"
        )
    problems = [
        f"{key}={config[key]!r}, where {value!r} alone is supported"
        for key, value in _FIXED.items()
        if config.get(key, value) != value
    ]
    problems += [
        f"the unknown key {key}={config[key]!r}"
        for key in sorted(config.keys() - _HARMLESS - _READ - _FIXED.keys())
    ]
    rope = config.get("rope_parameters") or {}
    scaling = _rope_scaling(config.get("rope_scaling") or rope, problems)
    if problems:
        raise UserError(
            f"{source}/config.json asks for what is not supported:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    try:
        heads = config["num_attention_heads"]
        return ModelConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim"),
            vocab_size=config["vocab_size"],
            max_sequence_length=_longest(config),
            rotary_base=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
            rope_scaling=scaling,
            norm_epsilon=float(config["rms_norm_eps"]),
            tie_embeddings=config.get("tie_word_embeddings", False),
            **_ARCHITECTURES[architecture],
        )
    except KeyError as error:
        raise UserError(f"{source}/config.json has no {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"{source}/config.json cannot be: {error}") from None


def config_of(
    model: ModelConfig, dtype: str, special_ids: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return config.json for a model that was never imported.

    Args:
        model: its shape.
        dtype: of the weights, as torch_dtype.
        special_ids: bos_token_id and eos_token_id, where the tokenizer names them; generation
            stops at the latter.

    Raises:
        UserError: transformers has no such architecture.
    """
    options = {"qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm}
    architectures = [
        name
        for name, implied in _ARCHITECTURES.items()
        if {"qkv_bias": False, "qk_norm": False} | implied == options
    ]
    if not architectures:
        raise UserError(
            "transformers has no architecture with both model.qkv_bias and model.qk_norm"
        )
    config: dict[str, Any] = {
        "architectures": architectures[:1],
        "model_type": architectures[0].removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
    }
    if scaling := model.rope_scaling:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_sequence_length,
            }
    return config | (special_ids or {})


def _longest(config: dict[str, Any]) -> int:
    """Return the maximum sequence length.

    It ends at a sliding window: within the window attention is plain causal attention, longer
    sequences are not supported.
    """
    longest = config["max_position_embeddings"]
    window = config.get("sliding_window")
    return min(longest, window) if window and config.get("use_sliding_window", True) else longest


def _rope_scaling(scaling: dict[str, Any], problems: list[str]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        problems.append(f"rope_scaling of type {kind!r}; there are linear and llama3")
        return None
    try:
        values = {"kind": kind, "factor": float(scaling["factor"])}
        if kind == "llama3":
            values["low_freq_factor"] = float(scaling["low_freq_factor"])
            values["high_freq_factor"] = float(scaling["high_freq_factor"])
            values["original_max_sequence_length"] = scaling["original_max_position_embeddings"]
        return RopeScaling(**values)
    except KeyError as error:
        problems.append(f"rope_scaling without {error.args[0]}")
    return None
