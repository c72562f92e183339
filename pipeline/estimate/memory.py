"""Number of parameters and bytes of a run on a rank, by arithmetic only.

On CPU the results are tested against built models and measured training steps
(tests/multiproc/test_planned.py), on a GPU against measured peaks (tests/unit/test_memory.py).
"""

import math
from collections import Counter
from dataclasses import dataclass

from retemper.pipeline.estimate.activations import SHARDED_BY_INPUT, Activations, bytes_of_element
from retemper.pipeline.estimate.activations_te import TransformerEngineActivations, layers_in_bf16
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.shapes import linear_layers

# Elements by (adapter or base, sharded over tensor-parallel ranks or on each of them).
Weights = Counter[tuple[str, bool]]


def parameter_counts(setup: ModelSetup) -> tuple[int, int]:
    """Return the numbers of (trainable, frozen) parameters of the whole model without building it.

    The padding of the vocabulary is included, as in model.build.
    """
    layers = _layer_weights(setup)
    model = setup.model
    whole = Counter({kind: count * model.num_layers for kind, count in layers.items()})
    whole["base", True] += (
        setup.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    )
    whole["base", False] += model.hidden_size
    return _trainable_and_frozen(
        setup, {kind: sum(whole[kind, sharded] for sharded in (True, False)) for kind in _KINDS}
    )


_KINDS = ("base", "adapters", "initial")  # the last are PiSSA's frozen factors


def _trainable_and_frozen(setup: ModelSetup, count: dict[str, int]) -> tuple[int, int]:
    if setup.method.name == "full":
        return count["base"], 0
    return count["adapters"], count["base"] + count["initial"]


def _layer_weights(setup: ModelSetup) -> Weights:
    model = setup.model
    lora = setup.method.lora
    count: Weights = Counter()
    sizes = linear_layers(model)
    count["base", True] = sum(
        features_in * features_out for features_in, features_out in sizes.values()
    )
    count["base", False] = 2 * model.hidden_size + (
        2 * model.kv_channels if model.qk_norm else 0
    )  # norms
    if model.qkv_bias:
        count["base", True] += sum(sizes[name][1] for name in ("q", "k", "v"))
    if lora is None:
        return count
    for target in lora.targets:
        features_in, features_out = sizes[target]
        A = lora.rank * features_in
        B = lora.rank * features_out
        by_input = target in SHARDED_BY_INPUT
        for kind in ("adapters", "initial") if lora.pissa else ("adapters",):
            count[kind, by_input] += A
            count[kind, not by_input] += B
        if lora.dora:
            count["adapters", not by_input] += features_out  # the magnitude
    return count


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of training and scoring on the ranks of one pipeline stage."""

    stage: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # that the forward pass leaves for the backward pass
    # Logits and loss, the backward pass of one layer, or the initial bf16 values of FP8 weights.
    temporary: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.temporary
        )


def worst_rank(config: Config, *, fused: bool = True) -> RankMemory:
    """Return the memory of the pipeline stage that needs the most.

    fused: for Transformer Engine's layers, as on a GPU; otherwise for megatron-core's, as on CPU.
    """
    stages = range(config.parallel.pipeline_parallel_size)
    return max(
        (rank_memory(config, stage, fused=fused) for stage in stages),
        key=lambda memory: memory.total,
    )


def rank_memory(config: Config, stage: int, *, fused: bool = True) -> RankMemory:
    """Return the memory of the ranks of one pipeline stage.

    Args:
        config: of the run.
        stage: number of the pipeline stage, from 0.
        fused: see `worst_rank`.
    """
    parallel = config.parallel
    element = bytes_of_element(config)
    activations_class = TransformerEngineActivations if fused else Activations
    elements = _stage_weights(config, stage)
    trainable, _ = _trainable_and_frozen(config, elements)
    # megatron-core's distributed optimizer reduces gradients in float32. Its float32 moments, and
    # for bf16 weights a float32 copy, are sharded over data- and context-parallel ranks. Float32
    # weights are updated in place.
    state = 4 * moments_of(config) + (0 if config.precision == "fp32" else 4)
    # Points in time that may be the peak, as (activations, temporary).
    peaks = activations_class(config, config.train.micro_batch_size).moments(stage)
    if config.evals.heldout:
        eval_batch = min(
            config.evals.micro_batch_size,
            math.ceil(config.evals.max_samples / parallel.data_parallel_size),
        )
        scoring = activations_class(config, eval_batch)
        peaks.append((scoring.constant(stage), scoring.scoring(stage)))
    states = {
        "weights": elements["base"] * element + _fp8_difference(config, stage),
        "adapters": (elements["adapters"] + elements["initial"]) * element,
        "gradients": trainable * 4,
        "optimizer": trainable
        * state
        // (parallel.data_parallel_size * parallel.context_parallel_size),
    }
    if config.fp8_weights:
        # While the model is built, only weights exist: those initialised in bf16, and beside them
        # those that Transformer Engine has created in FP8 (model/fp8.py, dequantized_weights).
        orders = 1 if config.method.name == "lora" and _has_one_scale(config) else 2
        building = elements["base"] * element + _both_orders(config, stage) * orders // 2
        peaks.append((0, building - sum(states.values())))
    activations, temporary = max(peaks, key=sum)
    return RankMemory(stage=stage, **states, activations=activations, temporary=temporary)


def moments_of(config: Config) -> int:
    """Return the number of moments that the optimizer stores per trainable parameter."""
    return {"adamw": 2, "lion": 1}[config.optimizer.name]


def _fp8_difference(config: ModelSetup, stage: int) -> int:
    """Return the bytes of a stage's linear layers in FP8, beyond those in bf16.

    The result is negative where only FP8 weights are stored. Transformer Engine multiplies with a
    weight and with its transpose. It stores both for a trainable weight; for a frozen weight with
    one scale per tensor only one (model/fp8.py), unless fp8.keep_transposed is set. Scales are one
    float32 per 128 × 128 elements, or one byte per 32.
    """
    if config.fp8_recipe is None:
        return 0
    frozen = config.method.name == "lora" and not config.fp8.keep_transposed
    size = _both_orders(config, stage) // (2 if frozen and _has_one_scale(config) else 1)
    return size - (2 * _elements_in_fp8(config, stage) if config.fp8_weights else 0)


def _has_one_scale(config: ModelSetup) -> bool:
    return config.fp8_recipe in ("delayed", "tensorwise")


def _both_orders(config: ModelSetup, stage: int) -> int:
    """Return the bytes of a stage's linear layers in FP8.

    Each weight, its transpose and their scales are counted.
    """
    assert config.fp8_recipe is not None, "without a recipe nothing is in FP8"
    scale = {"delayed": 0, "tensorwise": 0, "blockwise": 4 / 128**2, "mxfp8": 1 / 32}[
        config.fp8_recipe
    ]
    return round(2 * (1 + scale) * _elements_in_fp8(config, stage))


def _elements_in_fp8(config: ModelSetup, stage: int) -> int:
    model, parallel = config.model, config.parallel
    layers = model.num_layers // parallel.pipeline_parallel_size
    per_layer = sum(math.prod(sizes) for sizes in linear_layers(model).values())
    return (layers - layers_in_bf16(config, stage)) * per_layer // parallel.tensor_parallel_size


def _stage_weights(config: ModelSetup, stage: int) -> dict[str, int]:
    """Return the number of elements on one rank by kind."""
    model, parallel = config.model, config.parallel
    layers = model.num_layers // parallel.pipeline_parallel_size
    count = Counter({kind: elements * layers for kind, elements in _layer_weights(config).items()})
    first = stage == 0
    last = stage == parallel.pipeline_parallel_size - 1
    # A last stage that is not the first has a copy of a tied embedding.
    matrices = 1 if first and last and model.tie_embeddings else first + last
    count["base", True] += config.padded_vocab_size * model.hidden_size * matrices
    count["base", False] += model.hidden_size * last  # the final norm
    return {
        kind: count[kind, True] // parallel.tensor_parallel_size + count[kind, False]
        for kind in _KINDS
    }
