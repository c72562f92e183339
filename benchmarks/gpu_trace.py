"""Summarize one training step on the GPU from a trace of torch's profiler.

The summary has the kernels, and milliseconds by kind.

Kernels are told apart by name, as cuBLAS, cuDNN, Transformer Engine, Triton and torch name them on
Hopper. Two kinds are told by more. What follows the last product of the step is the optimizer's:
gradient norm, clipping, update. A product that is not in FP8 and takes less time than the smallest
of the frozen base could at the GPU's peak is an adapter's.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PRODUCTS = "products"
ADAPTERS = "adapter_products"
ATTENTION = "attention"
ELEMENTWISE = "elementwise"
NORMS = "norms_rope_swiglu"
QUANTISING = "quantising"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
COPIES = "copies_and_fills"
OTHER = "other"
KINDS = (
    PRODUCTS,
    ADAPTERS,
    ATTENTION,
    ELEMENTWISE,
    NORMS,
    QUANTISING,
    OPTIMIZER,
    COMMUNICATION,
    COPIES,
    OTHER,
)

# The first that is found within a name, in lower case, decides. Attention comes before products,
# for FlashAttention 3 is cutlass's too; torch's own kernels before quantising, for their templates
# are of casts.
_NAMES = (
    (COMMUNICATION, r"nccl|userbuffers|nvshmem"),
    (OPTIMIZER, r"multi_tensor_apply|lion|adam"),
    (ATTENTION, r"cudnn|sdpa|flash|fmha|attn"),
    (PRODUCTS, r"nvjet|gemm|gemv|splitk|cublas|cutlass|wgmma|_mm_"),
    (NORMS, r"rms_?norm|layer_?norm|rope|silu|swiglu|sigmoid"),
    (ELEMENTWISE, r"at::native|at::cuda|triton_"),
    (COPIES, r"mem(set|cpy)"),
    (QUANTISING, r"cast|quantiz|amax|transpose|fp8|scale|unary_kernel|swizzle"),
    (ELEMENTWISE, r"elementwise|reduce|copy|fill|cat"),
)
# cuBLAS names a product by the types of its operands: nvjet_qqtst_… has two more letters than
# nvjet_tst_… of 16 bits.
_FP8_PRODUCT = re.compile(r"nvjet_[a-z]{5}_|e4m3|e5m2|fp8")
_BACKENDS = (
    ("cuDNN", r"cudnn"),
    ("FlashAttention 3", r"flashattn|sm90.*flash"),
    ("FlashAttention 2", r"flash"),
    ("torch", r"fmha"),
)
_LARGEST = 25  # kernels that a summary names


@dataclass(frozen=True)
class Event:
    """A kernel or another operation on the GPU."""

    name: str
    start_us: float
    duration_us: float
    is_kernel: bool  # else a copy, or memory filled

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


def read(path: Path) -> list[Event]:
    """Return the GPU events of a Chrome trace, by start time.

    torch.profiler's export_chrome_trace writes such traces.
    """
    events = []
    for entry in json.loads(path.read_text())["traceEvents"]:
        category = entry.get("cat")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            events.append(
                Event(entry["name"], float(entry["ts"]), float(entry["dur"]), category == "kernel")
            )
    return sorted(events, key=lambda event: event.start_us)


def kind_of(event: Event, *, adapters_below_us: float = 0.0) -> str:
    """Return one of KINDS by the event's name; for a product by its duration too.

    adapters_below_us: the time that the smallest product of a frozen base in 16 bits takes at
    least; 0 without adapters.
    """
    if not event.is_kernel:
        return COPIES
    name = event.name.lower()
    kind = next((kind for kind, pattern in _NAMES if re.search(pattern, name)), OTHER)
    if kind == PRODUCTS and event.duration_us < adapters_below_us and not _FP8_PRODUCT.search(name):
        return ADAPTERS
    return kind


def kinds_of(events: list[Event], *, adapters_below_us: float = 0.0) -> list[str]:
    """Return the kind of each event of a whole step.

    What follows its last product is the optimizer's.
    """
    kinds = [kind_of(event, adapters_below_us=adapters_below_us) for event in events]
    last = max(
        (number for number, kind in enumerate(kinds) if kind in (PRODUCTS, ADAPTERS)),
        default=len(kinds),
    )
    return kinds[: last + 1] + [OPTIMIZER] * len(kinds[last + 1 :])


def summary(events: list[Event], *, adapters_below_us: float = 0.0) -> dict:
    """Summarize one step.

    Returns the number of kernels; the milliseconds in which the GPU was busy, and those in which it
    was not between the first event and the last; kernels and milliseconds by kind, which count
    twice what runs at once; the backend of attention; and the kernels that took most time.
    """
    kinds = kinds_of(events, adapters_below_us=adapters_below_us)
    kernels_of_kind = dict.fromkeys(KINDS, 0)
    ms_of_kind = dict.fromkeys(KINDS, 0.0)
    by_name: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event, kind in zip(events, kinds, strict=True):
        kernels_of_kind[kind] += event.is_kernel
        ms_of_kind[kind] += event.duration_us / 1000
        by_name[event.name, kind][0] += 1
        by_name[event.name, kind][1] += event.duration_us / 1000
    busy_ms = busy_us(events) / 1000
    span_us = max((event.end_us for event in events), default=0.0) - min(
        (event.start_us for event in events), default=0.0
    )
    largest = sorted(by_name.items(), key=lambda item: -item[1][1])[:_LARGEST]
    return {
        "kernels": sum(event.is_kernel for event in events),
        "copies_and_fills": sum(not event.is_kernel for event in events),
        "busy_ms": busy_ms,
        "gaps_ms": span_us / 1000 - busy_ms,
        "kernels_by_kind": {kind: kernels_of_kind[kind] for kind in KINDS if kernels_of_kind[kind]},
        "ms_by_kind": {kind: round(ms_of_kind[kind], 3) for kind in KINDS if ms_of_kind[kind]},
        "attention_backend": attention_backend(events),
        "largest": [
            {"name": name[:160], "kind": kind, "count": count, "ms": round(ms, 3)}
            for (name, kind), (count, ms) in largest
        ],
    }


def busy_us(events: list[Event]) -> float:
    """Return the microseconds in which at least one of the events, sorted by start, ran."""
    busy = 0.0
    until = float("-inf")
    for event in events:
        busy += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return busy


def attention_backend(events: list[Event]) -> str | None:
    """Return whose kernels computed attention, and whether any of them in FP8.

    It is None if none is known by its name.
    """
    names = {event.name.lower() for event in events if kind_of(event) == ATTENTION}
    for backend, pattern in _BACKENDS:
        if of_backend := [name for name in names if re.search(pattern, name)]:
            in_fp8 = any(re.search(r"e4m3|e5m2|fp8|_f8", name) for name in of_backend)
            return f"{backend}, FP8" if in_fp8 else backend
    return None
