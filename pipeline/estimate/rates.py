"""Measured training speeds, from which the time of another run is estimated.

They are copied from benchmarks/results/, which an installed package lacks: tests/unit/test_plan.py
compares both. A newer measurement replaces that of the same method, precision and micro-batch.
"""

import math
from dataclasses import dataclass

from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.gpus import peak_flops
from retemper.pipeline.schema.model import LoraConfig, ModelConfig
from retemper.pipeline.schema.run import Config

# All measurements: Llama-2-7B's shape on samples of this length, without recomputation.
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
_LORA = LoraConfig(rank=16, alpha=32, targets=["q", "k", "v", "o", "gate", "up", "down"])

# Cards of one generation, whose MFU is assumed to be the same.
_ALIKE = ("H100", "H200")


@dataclass(frozen=True)
class Measurement:
    """A part of a result in benchmarks/results/, on one card."""

    file: str
    part: str
    gpu: str
    method: str
    precision: str
    micro_batch_size: int
    tokens_per_second: float
    commit: str
    # As in ModelSetup; such a measurement also replays a CUDA graph of the passes.
    fused_adapters: bool = False

    @property
    def tokens(self) -> int:
        """The number of tokens in a micro-batch."""
        return self.micro_batch_size * SEQ_LENGTH

    @property
    def mfu(self) -> float:
        """The model FLOP/s over the card's peak."""
        flops = flops_per_token(_MODEL, _LORA if self.method == "lora" else None, SEQ_LENGTH)
        peak = peak_flops(self.gpu, self.precision)
        assert peak is not None, f"the peak of {self.gpu} in {self.precision} is not in gpus.py"
        return self.tokens_per_second * flops / peak


_NEWEST = "9953758153a393f1d14702a3007da6f58b96e324"
_OLDER = "97556e70a2231a317a04542c08ad6baff1b7f2cc"


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


def _lora(
    precision: str,
    rate: float,
    commit: str = _NEWEST,
    *,
    fused: bool = True,
    micro_batch_size: int = 1,
    file: str = "gpu-lora.json",
) -> Measurement:
    part = f"lora-{precision}-{'fused-graph' if fused else 'plain-eager'}"
    return Measurement(
        file=file,
        part=part if micro_batch_size == 1 else f"{part}-micro{micro_batch_size}",
        gpu="H200",
        method="lora",
        precision=precision,
        micro_batch_size=micro_batch_size,
        tokens_per_second=rate,
        commit=commit,
        fused_adapters=fused,
    )


MEASURED = [
    _full("bf16", 13012.9),
    _full("fp8_tensorwise", 18285.4),
    _lora("bf16", 17456.8),
    _lora("bf16", 17731.4, micro_batch_size=2),
    _lora("fp8_tensorwise", 23106.0),
    _lora("bf16", 14021.0, _OLDER, fused=False, file="gpu-lora-97556e7.json"),
    _lora("fp8_tensorwise", 16221.3, fused=False),
]


def nearest(config: Config, gpu: str) -> Measurement | None:
    """Return the measurement nearest to a run on cards of this name, or None if none is near.

    It must have the run's method and be of the same generation of cards, and in FP8 if and only if
    the run is. Among those, the same precision counts most, then the same implementation of
    adapters, then the same card, then the number of tokens in a micro-batch.
    """
    if not any(name in gpu for name in _ALIKE):
        return None
    tokens = config.train.micro_batch_size * config.data.seq_length
    tokens //= config.parallel.context_parallel_size

    def distance(measurement: Measurement) -> tuple[bool, bool, bool, float]:
        other_precision = measurement.precision != config.precision
        other_adapters = measurement.fused_adapters != config.fused_adapters
        doublings = abs(math.log2(tokens / measurement.tokens))
        return other_precision, other_adapters, measurement.gpu not in gpu, doublings

    candidates = [
        measurement
        for measurement in MEASURED
        if measurement.method == config.method.name and _same_width(measurement, config)
    ]
    return min(candidates, key=distance, default=None)


def _same_width(measurement: Measurement, config: Config) -> bool:
    """Return whether both compute in FP8, or both in the same other precision."""
    wide = {"bf16", "fp32"}
    if measurement.precision in wide or config.precision in wide:
        return measurement.precision == config.precision
    return True
