"""The keys of a config.json from which no model is made: which of them may be passed over.

Tools and older versions of transformers write keys of their own: generation settings, switches of
training, features of other architectures. One that could change what the model computes is refused
unless it switches that off.
"""

import re
from collections.abc import Iterator
from typing import Any

# Keys of nearly every folder, which are not worth a mention.
_USUAL = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "max_window_layers", "model_type", "pad_token_id", "pretraining_tp",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip

# The supported values of keys that transformers, or the name itself, gives a meaning.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "causal": (True,),
    "gated_mlp": (True,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0,),
    "position_embedding_type": ("rope", "rotary"),
    "scale_attn_weights": (True,),
    "transformers_weights": (None,),  # another file of weights than the usual one
    "use_rms_norm": (True,),
    "use_rope": (True,),
    "use_rotary_embeddings": (True,),
}

_COMPUTATION = re.compile(
    r"att(n|ention)|alibi|causal|head|window|chunk|sink|mask|rop[ey]|rotary|interleav|posit"
    r"|norm|(^|_)eps($|_)|epsilon|scal|multiplier|factor|cap(ping)?$|clip|logit|(^|_)mup"
    r"|(^|_)acts?($|_)|activ|bias|residual|layer|(^|_)mlp|ffn|dropout|pdrop"
    r"|quant|bits|bnb|gptq|awq|compress|spars|expert|moe|rout(er|ing)|mtp|lora"
)
# How a step is executed, what is returned, generation, and terms of the loss.
_NO_COMPUTATION = re.compile(
    r"flash_?att|(attn|experts)_implementation|^output_|fused|aux_loss|^renormalize|^mask_token"
)
_FACTOR = re.compile(r"scal|multiplier|factor")


def refused_keys(
    config: dict[str, Any], read: set[str], supported: dict[str, tuple[Any, ...]]
) -> Iterator[str]:
    """Yield a sentence for every key that could change what the model computes.

    Args:
        config: a config.json.
        read: keys from which the model is made.
        supported: values of keys that this architecture supports beyond those of all.
    """
    for key in sorted(config.keys() - read - _USUAL):
        value = config[key]
        if values := (_SUPPORTED | supported).get(key):
            if not any(_same(value, one) for one in values):
                yield f"{key}={value!r}, where {values[0]!r} alone is supported"
        elif _computes(key) and not _is_off(key, value):
            yield f"{key}={value!r}, which could change what the model computes"


def passed_over(config: dict[str, Any], read: set[str]) -> list[str]:
    """Return the keys that were accepted and have no effect, without the usual ones."""
    return sorted(config.keys() - read - _USUAL - _SUPPORTED.keys())


def _computes(key: str) -> bool:
    name = key.lower()
    return bool(_COMPUTATION.search(name)) and not _NO_COMPUTATION.search(name)


def _is_off(key: str, value: Any) -> bool:
    """Return whether a value switches off what its key names: empty, or a factor of one."""
    neutral = not isinstance(value, bool) and value == 1 and _FACTOR.search(key.lower())
    return not value or bool(neutral)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
