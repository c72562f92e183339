"""The rotary embeddings of a config.json, in the spelling of transformers 4 and in that of 5.

transformers 4 writes rope_theta and rope_scaling. transformers 5 writes rope_parameters: one
dictionary with both, or such a dictionary for each type of layer.
"""

from collections.abc import Iterator
from typing import Any

from retemper.pipeline.schema.model import RopeScaling

KEYS = {"rope_parameters", "rope_scaling", "rope_theta"}
_DEFAULT_THETA = 10000.0  # of transformers, for every supported family

# Type of scaling -> the numbers that it requires -> their fields in RopeScaling.
_NUMBERS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_sequence_length",
    },
}
# Numbers that change nothing at these values.
_WITHOUT_EFFECT = {"partial_rotary_factor": 1.0, "attention_factor": 1.0}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embeddings of a config.json as transformers 5 spells them.

    Returns:
        rope_type, rope_theta, and the numbers that the type requires.

    Raises:
        ValueError: it names a key whose value is not supported, or that contradicts another.
    """
    found: dict[str, tuple[str, Any]] = {}
    for place, key, value in _entries(config):
        before, other = found.setdefault(key, (place, value))
        if other != value:
            raise ValueError(f"{before}={other!r}, but {place}={value!r}: remove the wrong one")
    place, kind = found.pop("rope_type", ("rope_scaling", "default"))
    section = place.rpartition(".")[0] or place
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise ValueError(f"{section} of type {kind!r}; there are default, linear and llama3")
    if missing := sorted(_NUMBERS[kind].keys() - found.keys()):
        raise ValueError(f"{section} without {', '.join(missing)}")
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": _DEFAULT_THETA}
    for key, (place, value) in found.items():
        if key in _NUMBERS[kind] or key == "rope_theta":
            rope[key] = _positive(place, value)
        elif value != _WITHOUT_EFFECT.get(key):
            raise ValueError(f"{place}={value!r}, which the type {kind} does not have")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{section}.low_freq_factor is not below high_freq_factor")
    return rope


def scaling_of(rope: dict[str, Any]) -> RopeScaling | None:
    """Return the scaling of what `rope_parameters` returned; None for the type default."""
    kind = rope["rope_type"]
    if kind == "default":
        return None
    numbers: dict[str, Any] = {field: rope[key] for key, field in _NUMBERS[kind].items()}
    return RopeScaling(kind=kind, **numbers)


def parameters_of(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return rope_parameters for a base and a scaling of the rotary embeddings."""
    kind = scaling.kind if scaling else "default"
    numbers = {key: getattr(scaling, field) for key, field in _NUMBERS[kind].items()}
    return {"rope_type": kind, "rope_theta": theta} | numbers


def in_both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike.

    transformers 4 ignores rope_parameters; versions before 4.56 ignore dtype.
    """
    rope = rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    both = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        both |= {"dtype": dtype, "torch_dtype": dtype}
    return config | both


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (place, key, value) of every parameter that is set, from every spelling."""
    for name in ("rope_parameters", "rope_scaling"):
        for place, section in _sections(name, config):
            if not isinstance(section, dict):
                raise ValueError(f"{place}={section!r}, which is no dictionary")
            for key, value in section.items():
                if value is not None:
                    yield f"{place}.{key}", "rope_type" if key == "type" else key, value
    if config.get("rope_theta") is not None:
        yield "rope_theta", "rope_theta", config["rope_theta"]


def _sections(name: str, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dictionary below a key, or one for each type of layer that the model has."""
    section = config.get(name)
    if section is None:
        return
    by_type = isinstance(section, dict) and any(isinstance(one, dict) for one in section.values())
    if not by_type:
        yield name, section
        return
    for layer_type in sorted(set(config.get("layer_types") or section)):
        yield f"{name}.{layer_type}", section.get(layer_type)


def _positive(place: str, value: Any) -> float | int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise ValueError(f"{place}={value!r}, which is no number above 0")
    if not place.endswith("embeddings"):
        return float(value)
    if value != int(value):
        raise ValueError(f"{place}={value!r}, which is no whole number")
    return int(value)
