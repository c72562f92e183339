"""Convert between config.json of a transformers folder and the model config.

Every unsupported option in config.json is refused and named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retemper.pipeline.corpus.tokenizer import fetched, is_hub_name
from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface import rotary, unread_keys
from retemper.pipeline.huggingface.own_files import GENERATION, TOKENIZER_FILES, read_own
from retemper.pipeline.schema.model import ModelConfig


@dataclass(frozen=True)
class _Family:
    """What an architecture means beyond the values in config.json."""

    options: dict[str, Any] = field(default_factory=dict)  # of ModelConfig
    defaults: dict[str, Any] = field(default_factory=dict)  # of transformers, for absent keys
    supported: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # beyond those of all


_QWEN = {"num_key_value_heads": 32, "use_sliding_window": False}
_FAMILIES = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": _Family({"qkv_bias": True}, _QWEN, {"attention_bias": (False, True)}),
    "Qwen3ForCausalLM": _Family({"qk_norm": True}, _QWEN | {"head_dim": 128}),
}

# The numbers that a model is made of: the field of ModelConfig, and the key of config.json.
_REQUIRED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window")
_SWITCHES = ("tie_word_embeddings", "use_sliding_window")
_READ = {*_REQUIRED.values(), *_OPTIONAL_COUNTS, *_SWITCHES, *rotary.KEYS, "layer_types"}


# The weights to download from a hub repository; the second if it has none of the first.
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_ADAPTERS = "adapter_config.json"  # of peft
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def transformers_folder(name: str, given: str) -> Path:
    """Return a folder unchanged, or for a hub name the folder of its downloaded files.

    Args:
        name: a folder, or a hub name: owner/name or owner/name@revision.
        given: the name as the user wrote it, for the message of UserError.
    """
    if Path(name).exists() or not is_hub_name(name):
        return Path(name)
    small_files = ("config.json", GENERATION, *TOKENIZER_FILES)
    folder = fetched(name, (*small_files, *_SAFETENSORS), given)
    if not any(folder.glob("*.safetensors")):
        folder = fetched(name, (*small_files, *_PICKLED), given)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder.

    Raises:
        UserError: it is missing or damaged, or the folder is one of adapters.
    """
    if (folder / _ADAPTERS).exists():
        raise UserError(
            f"{folder} holds adapters ({_ADAPTERS}), with which transformers loads their base in "
            "place of the weights beside them: name a folder of the merged model alone"
        )
    try:
        return read_own(folder / "config.json")
    except FileNotFoundError:
        raise UserError(f"{folder} is no transformers folder: it has no config.json") from None


def passed_over(config: dict[str, Any]) -> list[str]:
    """Return the keys of config.json that are accepted and have no effect on the model."""
    return unread_keys.passed_over(config, _READ)


def model_of(config: dict[str, Any], source: Path) -> ModelConfig:
    """Return the model that config.json describes.

    Raises:
        UserError: the architecture or an option is not supported, or a key is missing or invalid.
    """
    family = _FAMILIES[_architecture(config, source)]
    values = family.defaults | config
    problems = [
        *unread_keys.refused_keys(config, _READ, family.supported),
        *_invalid(values),
        *_contradictions(values),
    ]
    try:
        rope = rotary.rope_parameters(config)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError(
            f"{source}/config.json asks for what is not supported:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    numbers = {name: values[key] for name, key in _REQUIRED.items()}
    return ModelConfig(
        **numbers
        | {"max_sequence_length": _longest(values), "norm_epsilon": float(values["rms_norm_eps"])},
        num_query_groups=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_size=values.get("head_dim"),
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=rotary.scaling_of(rope),
        tie_embeddings=bool(values.get("tie_word_embeddings")),
        **family.options,
    )


def readable_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder in the spelling of transformers 4 and of 5.

    Keys without effect that are empty are left out: transformers 4 fails at an empty
    quantization_config.

    Raises:
        UserError: it does not describe a supported model.
    """
    config = read_config(folder)
    architecture = _architecture(config, folder)
    try:
        both = rotary.in_both_spellings(config)
    except ValueError as error:
        raise UserError(f"{folder}/config.json: {error}") from None
    empty = [key for key in passed_over(config) if config[key] in (None, {})]
    names = {"architectures": [architecture], "model_type": model_type_of(architecture)}
    return {key: value for key, value in both.items() if key not in empty} | names


def model_type_of(architecture: str) -> str:
    """Return the name by which transformers finds an architecture."""
    return architecture.removesuffix("ForCausalLM").lower()


def _architecture(config: dict[str, Any], source: Path) -> str:
    """Return the supported architecture that `architectures` or `model_type` names.

    transformers chooses by the latter.

    Raises:
        UserError: there is none, or they contradict each other.
    """
    model_type = config.get("model_type")
    listed = config.get("architectures") or [
        name for name in _FAMILIES if model_type_of(name) == model_type
    ]
    listed = listed if isinstance(listed, list) else [listed]
    supported = [name for name in _FAMILIES if name in listed]
    if not supported:
        raise UserError(
            f"{source}/config.json, architectures: the architecture "
            f"{', '.join(map(str, listed)) or 'none named'} is not supported; "
            f"there are {', '.join(_FAMILIES)}"
        )
    if len(supported) > 1 or model_type not in (None, model_type_of(supported[0])):
        raise UserError(
            f"{source}/config.json: architectures={listed} and model_type={model_type!r} "
            "contradict each other: leave in both the one whose weights these are"
        )
    return supported[0]


def _invalid(values: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for every number or switch that is missing or of another kind."""
    for key in (*_REQUIRED.values(), *_OPTIONAL_COUNTS):
        value = values.get(key)
        kind = int | float if key == "rms_norm_eps" else int
        if value is None and key not in _OPTIONAL_COUNTS:
            yield f"no {key}"
        elif value is not None and (
            not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < float("inf")
        ):
            noun = "number" if key == "rms_norm_eps" else "whole number"
            yield f"{key}={value!r}, which is no {noun} above 0"
    for key in _SWITCHES:
        if values.get(key) not in (None, True, False):
            yield f"{key}={values[key]!r}, which is neither true nor false"


def _contradictions(values: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for every key that contradicts another one."""
    types = values.get("layer_types")
    layers = values.get("num_hidden_layers")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            yield f"layer_types={types!r}, which is no list of num_hidden_layers={layers!r} types"
        elif others := [one for one in types if one not in ("full_attention", "sliding_attention")]:
            yield f"layer_types with {others[0]!r}; there are full_attention and sliding_attention"
        elif "sliding_attention" in types and not _window(values):
            yield "layer_types with sliding_attention, but no sliding_window is in use"
    heads = values.get("num_attention_heads")
    groups = values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        yield f"num_key_value_heads={groups}, which does not divide num_attention_heads={heads}"
    vocabulary = values.get("vocab_size")
    padding = values.get("pad_token_id")
    if isinstance(padding, int) and isinstance(vocabulary, int) and padding >= vocabulary:
        yield (
            f"pad_token_id={padding}, but vocab_size={vocabulary} ends before it: "
            "set it to null, or to a token of the vocabulary"
        )


def config_of(
    model: ModelConfig, dtype: str, special_ids: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return config.json for a model that was never imported.

    Args:
        model: its shape.
        dtype: of the weights.
        special_ids: bos_token_id and eos_token_id, where the tokenizer names them; generation
            stops at the latter.

    Raises:
        UserError: transformers has no such architecture.
    """
    options = {"qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm}
    architectures = [
        name
        for name, family in _FAMILIES.items()
        if {"qkv_bias": False, "qk_norm": False} | family.options == options
    ]
    if not architectures:
        raise UserError(
            "transformers has no architecture with both model.qkv_bias and model.qk_norm"
        )
    config: dict[str, Any] = {
        "architectures": architectures[:1],
        "model_type": model_type_of(architectures[0]),
        "hidden_act": "silu",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_parameters": rotary.parameters_of(model.rotary_base, model.rope_scaling),
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
    }
    return rotary.in_both_spellings(config) | (special_ids or {})


def _longest(values: dict[str, Any]) -> int:
    """Return the maximum sequence length.

    It ends at a sliding window: within the window attention is plain causal attention, longer
    sequences are not supported.
    """
    return min(values["max_position_embeddings"], _window(values) or math.inf)


def _window(values: dict[str, Any]) -> int | None:
    """Return the sliding window, if one is in use."""
    return values.get("sliding_window") if values.get("use_sliding_window", True) else None
