"""The config keys of a model on its ranks: shape, method, parallel layout and precision."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from retemper.pipeline.schema.section import PositiveInt, Section


class RopeScaling(Section):
    """The scaling of rotary frequencies for sequences longer than in the first pretraining."""

    kind: Literal["linear", "llama3"]
    """linear: all frequencies are divided by factor; llama3: only the low ones, as in Llama 3.1."""
    factor: float = Field(gt=0)
    """Divisor of the frequencies."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: frequencies with a wavelength longer than original_max_sequence_length divided by
    this number are divided by factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: frequencies with a wavelength shorter than original_max_sequence_length divided by
    this number stay as they are; those between are interpolated."""
    original_max_sequence_length: PositiveInt = 8192
    """llama3: the sequence length of the first pretraining."""


class ModelConfig(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary embeddings, grouped-query attention."""

    num_layers: PositiveInt
    """Number of transformer layers."""
    hidden_size: PositiveInt
    """Features of the hidden state."""
    ffn_hidden_size: PositiveInt
    """Features inside the feed-forward layers."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_query_groups: PositiveInt
    """Number of key/value heads; equal to num_attention_heads without GQA."""
    vocab_size: PositiveInt
    """Vocabulary size of the tokenizer; padding for tensor parallelism is added to it."""
    max_sequence_length: PositiveInt
    """Maximum number of tokens of a sequence."""
    head_size: PositiveInt | None = None
    """Features of one attention head. By default hidden_size / num_attention_heads."""
    qkv_bias: bool = False
    """Add biases to the query, key and value projections, as in Qwen 2."""
    qk_norm: bool = False
    """Apply RMSNorm to the query and key of each head, as in Qwen 3."""
    rotary_base: float = 10000.0
    """Base of the rotary embeddings (theta)."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies. null applies none."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the normal initialization; that of output projections is divided by
    sqrt(2 × num_layers)."""
    tie_embeddings: bool = False
    """Share the weights of the input embedding and the output layer."""

    @property
    def kv_channels(self) -> int:
        """The number of features of one attention head."""
        return self.head_size or self.hidden_size // self.num_attention_heads


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


_TARGET_GROUPS: dict[str, list[LoraTarget]] = {
    "attention": ["q", "k", "v", "o"],
    "mlp": ["gate", "up", "down"],
}


_TARGET_GROUPS["all"] = _TARGET_GROUPS["attention"] + _TARGET_GROUPS["mlp"]


def _expand_targets(targets: Any) -> Any:
    """Expand all, attention and mlp to the lists of layers that they stand for."""
    if isinstance(targets, str):
        if targets not in _TARGET_GROUPS:
            raise ValueError(
                f"targets must be all, attention, mlp, or a list as [q,v]; got {targets!r}"
            )
        return _TARGET_GROUPS[targets]
    return targets


class LoraConfig(Section):
    """Low-rank adapters as in peft: one A and one B for each linear layer."""

    rank: PositiveInt
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank. By default alpha is 2 × rank, as in the paper; with
    rslora it is required."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the adapters' input."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Train the norm of each weight row separately from its direction (DoRA)."""
    pissa: bool = False
    """Initialize the adapters from the principal components of each weight instead of zero
    (PiSSA)."""
    lr_ratio: float = Field(1.0, ge=1)
    """Learning rate of B divided by that of A, as in LoRA+."""
    targets: Annotated[list[LoraTarget], BeforeValidator(_expand_targets)] = Field(min_length=1)
    """Layers with adapters: all, attention (q, k, v, o), mlp (gate, up, down), or a list of
    them, e.g. [q,v]."""
    kernel: Literal["fused", "plain"] = "fused"
    """fused: a frozen layer and its adapters are one function, which adds the product of the
    base to theirs; plain: each product and sum is a separate operation. dropout, dora, pissa,
    parallel.overlap and parallel.tensor_parallel_overlap always use plain."""

    @model_validator(mode="before")
    @classmethod
    def _default_alpha(cls, values: Any) -> Any:
        """Set the default of alpha, so that stored configs keep it if the default changes later."""
        if not isinstance(values, dict) or values.get("alpha") is not None or values.get("rslora"):
            return values
        rank = values.get("rank")
        return values | {"alpha": 2.0 * rank} if isinstance(rank, int) and rank > 0 else values


class MethodConfig(Section):
    """The method of training: full training or LoRA."""

    name: Literal["full", "lora"]
    """full: train all weights; lora: train adapters on a frozen base."""
    lora: LoraConfig | None = None
    """Adapters, required with method.name=lora. null for full training."""

    @property
    def adapters(self) -> LoraConfig:
        """The settings of the adapters, for code that only method.name=lora reaches."""
        assert self.lora is not None, "full training has no adapters"
        return self.lora


class ParallelConfig(Section):
    """The distribution of a model and its batches over ranks.

    The world size is the product of the tensor, pipeline, context and data-parallel sizes.
    """

    tensor_parallel_size: PositiveInt = 1
    """Number of ranks that share the weights of every layer."""
    pipeline_parallel_size: PositiveInt = 1
    """Number of ranks over which the layers are distributed in stages."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Number of stages per pipeline rank, interleaved to reduce the pipeline bubble."""
    context_parallel_size: PositiveInt = 1
    """Number of ranks that share the tokens of every sequence."""
    data_parallel_size: PositiveInt = 1
    """Number of model replicas that share the samples of every batch."""
    sequence_parallel: bool = False
    """Distribute tokens over tensor-parallel ranks where these would repeat work: norms and
    residuals."""
    recompute: Literal["none", "swiglu", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass instead of stored. swiglu: the product
    of gate and up, with method=lora; selective: those of feed-forward layers; full: all."""
    overlap: bool = False
    """Overlap communication with computation: reduce gradients during the backward pass, and gather
    weights during the forward pass."""
    tensor_parallel_overlap: bool = False
    """Overlap tensor-parallel communication with matrix multiplications. Requires Transformer
    Engine and sequence_parallel."""

    @property
    def model_parallel_size(self) -> int:
        """The number of ranks that one replica of the model is distributed over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        """The number of ranks of the run."""
        return self.model_parallel_size * self.data_parallel_size


class Fp8Config(Section):
    """The settings of FP8 precisions, in addition to the recipe."""

    param_gather: bool = False
    """In full training, store and gather weights in FP8, beside float32 weights in the
    optimizer. A frozen base is always stored in FP8."""
    bf16_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the start, and as many at the end, that stay in bf16."""
    keep_transposed: bool = False
    """With method=lora, store the transpose of each frozen weight, one more byte per weight,
    instead of computing it in every backward pass."""
    attention: bool = False
    """Compute attention in FP8, too, with precision=fp8_tensorwise or fp8_delayed."""


class DropoutConfig(Section):
    """Dropout in the model itself, beside that of adapters (method.lora.dropout).

    It is a setting of a run, not of the model's shape, which a run takes from its base.
    """

    attention: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of attention weights. On a CPU attention then has no fused kernel."""
    hidden: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the embeddings, and of the outputs of attention and feed-forward
    layers before they are added to the residual stream."""


Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


_FP8_RECIPES: dict[str, Fp8Recipe] = {
    "fp8_delayed": "delayed",
    "fp8_tensorwise": "tensorwise",
    "fp8_blockwise": "blockwise",
    "mxfp8": "mxfp8",
}


class ModelSetup(Section):
    """All settings that building a model on its ranks needs."""

    model: ModelConfig
    """Shape of the model."""
    method: MethodConfig
    """Training method."""
    parallel: ParallelConfig
    """Distribution over ranks."""
    precision: Literal[
        "fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"
    ] = "bf16"
    """Precision of computation. The 8-bit precisions are Transformer Engine's recipes for the
    linear layers; everything else is then computed in bf16."""
    fp8: Fp8Config = Fp8Config()
    """Settings of the 8-bit precisions."""
    dropout: DropoutConfig = DropoutConfig()
    """Dropout in the model."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    """Seed of initial weights, data order and dropout."""

    @property
    def fp8_recipe(self) -> Fp8Recipe | None:
        """The scaling recipe of FP8 computation, or None for other precisions."""
        return _FP8_RECIPES.get(self.precision)

    @property
    def fp8_weights(self) -> bool:
        """Whether the weights of linear layers are stored in FP8 instead of bf16."""
        return self.fp8_recipe is not None and (self.fp8.param_gather or self.method.name == "lora")

    @property
    def fused_adapters(self) -> bool:
        """Whether training computes a frozen layer and its adapters as one function.

        The function is in model/adapted.py.
        """
        lora = self.method.lora
        return lora is not None and lora.kernel == "fused" and not self.unfused_because

    @property
    def unfused_because(self) -> list[str]:
        """The keys whose values prevent method.lora.kernel=fused."""
        lora = self.method.lora
        parallel = self.parallel
        causes = {
            "method.lora.dropout": lora and lora.dropout,
            "method.lora.dora": lora and lora.dora,
            "method.lora.pissa": lora and lora.pissa,
            "parallel.overlap": parallel.overlap,
            "parallel.tensor_parallel_overlap": parallel.tensor_parallel_overlap,
        }
        return [key for key, value in causes.items() if value]

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size, rounded up so that all ranks have shards of equal size.

        It is a multiple of 128 wherever that suffices, so that weights have the same shape at
        every usual tensor-parallel size.
        """
        multiple = math.lcm(128, self.parallel.tensor_parallel_size)
        return math.ceil(self.model.vocab_size / multiple) * multiple

    @classmethod
    def of(cls, config: dict[str, Any], parallel: ParallelConfig, **changes: Any) -> "ModelSetup":
        """Return the setup of a dumped config's model in another parallel layout.

        Args:
            config: the dumped config.
            parallel: the other layout.
            **changes: further fields to replace.
        """
        # Configs from before fp8 was added do not have that key.
        fields = {name: config[name] for name in ModelSetup.model_fields if name in config}
        return cls(**fields | {"parallel": parallel} | changes)
