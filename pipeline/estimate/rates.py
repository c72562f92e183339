"""Training speeds that were measured, from which the time of another run is estimated.

They are from bench/, which an installed package does not have: tests/unit/test_plan.py compares
both. A measurement with later code replaces that of the same method, precision and micro-batch.
"""

import math
from dataclasses import dataclass

from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.gpus import peak_flops
from retemper.pipeline.schema.model import LoraConfig, ModelConfig
from retemper.pipeline.schema.run import Config

# What was trained: Llama-2-7B's shape on samples of this length, nothing computed again.
SEQ_LENGTH = 4096
_MODEL = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    vocab_size=32000,
    max_sequence_length=SEQ_LENGTH,
)
_LORA = LoraConfig(rank=16, alpha=32, targets="all")

# Cards of one generation, between which a share of the peak is carried over.
_ALIKE = ("H100", "H200")


@dataclass(frozen=True)
class Measurement:
    """A part of a result in bench/, on one card."""

    file: str
    part: str
    gpu: str
    method: str
    precision: str
    micro_batch_size: int
    tokens_per_second: float
    commit: str
    fused_adapters: bool = False  # as ModelSetup has it, and a graph of the passes was replayed

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * SEQ_LENGTH

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the card's peak."""
        flops = flops_per_token(_MODEL, _LORA if self.method == "lora" else None, SEQ_LENGTH)
        return self.tokens_per_second * flops / peak_flops(self.gpu, self.precision)


def _full(precision: str, rate: float) -> Measurement:
    return Measurement(
        file="gpu.json",
        part=f"full {precision}",
        gpu="H200",
        method="full",
        precision=precision,
        micro_batch_size=1,
        tokens_per_second=rate,
        commit="645f4c6a12d300cdf0c643b3931157537b10fa8a",
    )


def _lora(precision: str, rate: float, commit: str, *, fused: bool) -> Measurement:
    return Measurement(
        file="gpu-lora.json",
        part=f"lora-{precision}-{'fused-graph' if fused else 'plain-eager'}",
        gpu="H200",
        method="lora",
        precision=precision,
        micro_batch_size=1,
        tokens_per_second=rate,
        commit=commit,
        fused_adapters=fused,
    )


_FUSED = "6f6be28ef5725904e0ffc712fa57c71900e0e31b"
_PLAIN = "97556e70a2231a317a04542c08ad6baff1b7f2cc"
MEASURED = [
    _full("bf16", 13012.9),
    _full("fp8_tensorwise", 18285.4),
    _lora("bf16", 17264.1, _FUSED, fused=True),
    _lora("fp8_tensorwise", 22587.9, _FUSED, fused=True),
    _lora("bf16", 14021.0, _PLAIN, fused=False),
    _lora("fp8_tensorwise", 14667.2, _PLAIN, fused=False),
]


def nearest(config: Config, gpu: str) -> Measurement | None:
    """The measurement that is nearest to a run on cards of this name; None where none is near.

    It has the run's method, is of the same generation of cards, and in 8 bits where the run is. Of
    those the same recipe counts most, then adapters computed in the same way, then the same card,
    then the tokens of a micro-batch.
    """
    if not any(name in gpu for name in _ALIKE):
        return None
    tokens = config.train.micro_batch_size * config.data.seq_length
    tokens //= config.parallel.context_parallel_size

    def distance(one: Measurement) -> tuple[bool, bool, bool, float]:
        other_recipe = one.precision != config.precision
        other_path = one.fused_adapters != config.fused_adapters
        away = abs(math.log2(tokens / one.tokens))
        return other_recipe, other_path, one.gpu not in gpu, away

    near = [one for one in MEASURED if one.method == config.method.name and _as_wide(one, config)]
    return min(near, key=distance, default=None)


def _as_wide(one: Measurement, config: Config) -> bool:
    """Whether both compute in 8 bits, or both in the same other precision."""
    wide = {"bf16", "fp32"}
    if one.precision in wide or config.precision in wide:
        return one.precision == config.precision
    return True
