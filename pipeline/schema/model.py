"""The keys of a model on its ranks: its shape, its method, its layout, its precision."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from retemper.pipeline.schema.section import PositiveInt, Section


class RopeScaling(Section):
    """How rotary frequencies are stretched for longer sequences than the model was first trained on."""

    kind: Literal["linear", "llama3"] = Field(
        description="linear: all divided by factor; llama3: the slow ones, as Llama 3.1 does"
    )
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_sequence_length: PositiveInt = 8192


class ModelConfig(Section):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt = Field(
        description="key/value heads; equal to num_attention_heads without GQA"
    )
    vocab_size: PositiveInt = Field(
        description="of the tokenizer; padding for tensor parallelism is added on top"
    )
    max_sequence_length: PositiveInt
    head_size: PositiveInt | None = Field(
        None, description="by default hidden_size / num_attention_heads"
    )
    qkv_bias: bool = Field(
        False, description="of the query, key and value projections, as Qwen 2 has it"
    )
    qk_norm: bool = Field(
        False, description="RMSNorm of each head's query and key, as Qwen 3 has it"
    )
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    init_std: float = Field(
        0.02,
        description="of the normal initialisation; output projections get 1/sqrt(2 layers) of it",
    )
    tie_embeddings: bool = False

    @property
    def kv_channels(self) -> int:
        """Features of one head."""
        return self.head_size or self.hidden_size // self.num_attention_heads


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


_TARGETS: dict[str, list[LoraTarget]] = {
    "attention": ["q", "k", "v", "o"],
    "mlp": ["gate", "up", "down"],
}


_TARGETS["all"] = _TARGETS["attention"] + _TARGETS["mlp"]


def _listed(targets: Any) -> Any:
    """all, attention and mlp as the layers that they are."""
    if isinstance(targets, str):
        if targets not in _TARGETS:
            raise ValueError(
                f"targets are all, attention, mlp, or a list as [q,v]; got {targets!r}"
            )
        return _TARGETS[targets]
    return targets


class LoraConfig(Section):
    """Canonical low-rank adapters, one A and B for each linear layer, as peft has them."""

    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="the update is scaled by alpha / rank; left out, alpha is 2 × rank, as in the "
        "paper, but with rslora it must be given",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(
        False, description="train the norm of each weight row apart from its direction"
    )
    pissa: bool = Field(
        False, description="begin with the principal part of each weight instead of zero"
    )
    lr_ratio: float = Field(
        1.0, ge=1, description="learning rate of B over that of A, as LoRA+ has it"
    )
    targets: Annotated[list[LoraTarget], BeforeValidator(_listed)] = Field(
        min_length=1,
        description="all, attention (q, k, v, o), mlp (gate, up, down), or a list of them, as [q,v]",
    )
    kernel: Literal["fused", "plain"] = Field(
        "fused",
        description="fused: a frozen layer with its adapters is one function that adds the base's product onto theirs; plain: "
        "each product and sum is an operation of its own. dropout, dora, pissa and parallel.overlap are always computed plainly",
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_rank(cls, values: Any) -> Any:
        """Written down is the number, which stays what it was should the usual one change."""
        if not isinstance(values, dict) or values.get("alpha") is not None or values.get("rslora"):
            return values
        rank = values.get("rank")
        return values | {"alpha": 2.0 * rank} if isinstance(rank, int) and rank > 0 else values


class MethodConfig(Section):
    """Which weights train."""

    name: Literal["full", "lora"]
    lora: LoraConfig | None = None


class ParallelConfig(Section):
    """How one model and one batch are spread over ranks; world size is the product of the four sizes."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt = Field(
        1, description="stages that each pipeline rank holds, interleaved for a shorter bubble"
    )
    context_parallel_size: PositiveInt = Field(
        1, description="ranks that share the tokens of every sequence"
    )
    data_parallel_size: PositiveInt = 1
    sequence_parallel: bool = Field(
        False,
        description="tensor-parallel ranks share the tokens where they would repeat work: norms, residuals",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward pass instead of kept: selective those of feed-forward layers, full all",
    )
    overlap: bool = Field(
        False,
        description="gradients are reduced during the backward pass, weights gathered during the forward pass and, with virtual stages, "
        "activations sent beside computation",
    )
    tensor_parallel_overlap: bool = Field(
        False,
        description="tensor-parallel communication beside matrix multiplications; Transformer Engine's, with sequence_parallel",
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.data_parallel_size


class Fp8Config(Section):
    """Of precisions in 8 bits, beside the recipe."""

    param_gather: bool = Field(
        False,
        description="full training keeps and gathers its weights in FP8, beside float32 ones of the optimizer; a frozen base is always in FP8",
    )
    bf16_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="of the first layers, and as many of the last, that stay in bf16"
    )
    keep_transposed: bool = Field(
        False,
        description="with method=lora keep the transposed copy of each frozen weight, one more byte a weight, "
        "instead of making it anew in every backward pass",
    )
    attention: bool = Field(
        False,
        description="compute attention in FP8 too, with precision=fp8_tensorwise or fp8_delayed",
    )


class ModelSetup(Section):
    """A model on its ranks: all that building it needs to know."""

    model: ModelConfig
    method: MethodConfig
    parallel: ParallelConfig
    precision: Literal[
        "fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"
    ] = Field(
        "bf16",
        description="of computation; the 8-bit ones are Transformer Engine's recipes for the linear layers, the rest is bf16 there",
    )
    fp8: Fp8Config = Fp8Config()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        17, description="of initial weights, data order and dropout"
    )

    @property
    def fp8_recipe(self) -> Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None:
        """How FP8 numbers are scaled, where they are computed with."""
        return (
            self.precision.removeprefix("fp8_") if self.precision not in ("fp32", "bf16") else None
        )

    @property
    def fp8_weights(self) -> bool:
        """Whether weights of linear layers are held in FP8, and not in bf16."""
        return self.fp8_recipe is not None and (self.fp8.param_gather or self.method.name == "lora")

    @property
    def fused_adapters(self) -> bool:
        """Whether a frozen layer and its adapters are one function in training (model/adapted.py)."""
        lora = self.method.lora
        parallel = self.parallel
        if lora is None or lora.kernel == "plain":
            return False
        overlap = parallel.overlap or parallel.tensor_parallel_overlap
        return not (lora.dropout or lora.dora or lora.pissa or overlap)

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary rounded up so that every rank's shard is equal: to a multiple of 128 wherever that suffices, so
        that weights have one shape at every usual tensor-parallel size."""
        multiple = math.lcm(128, self.parallel.tensor_parallel_size)
        return math.ceil(self.model.vocab_size / multiple) * multiple

    @classmethod
    def of(cls, config: dict[str, Any], parallel: ParallelConfig, **changes: Any) -> "ModelSetup":
        """The model of a dumped config in another layout."""
        kept = {
            name: config[name] for name in ModelSetup.model_fields if name in config
        }  # fp8 came later than others
        return cls(**kept | {"parallel": parallel} | changes)
