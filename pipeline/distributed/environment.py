"""The environment variables that a fast run on GPUs needs, in one table.

Variables that the user has set keep their values. CUDA, NCCL, Transformer Engine and torch's
allocator each read them once, when they start, so `prepare` must be called before any of them. The
values come from NVIDIA's performance recipes (Megatron-Bridge, scripts/performance), without
TORCH_NCCL_AVOID_RECORD_STREAMS: torch behaves so by default since 2.8, and warns if it is set.
"""

import ctypes
import os
from dataclasses import dataclass, field

from retemper.pipeline.schema.model import ParallelConfig

_HOPPER = 9  # major compute capability of Hopper GPUs

# Other names of the same torch setting; torch 2.10 and 2.11 warn that this one is deprecated.
_ALIASES = {"PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF",)}


@dataclass(frozen=True)
class Environment:
    """The variables of the table and their values in this process."""

    # Variables with the table's value, set by `prepare` or before it.
    chosen: dict[str, str] = field(default_factory=dict)
    # Variables that already had a value other than the table's.
    kept: dict[str, str] = field(default_factory=dict)
    # Why an overlap that the config enables may not happen.
    warning: str | None = None

    def __str__(self) -> str:
        """Return the variables in one line; empty if there are none."""
        parts = [f"{name}={value}" for name, value in self.chosen.items()]
        parts += [f"{name}={value} (already set)" for name, value in self.kept.items()]
        return ", ".join(parts)


_in_force = Environment()


def prepare(parallel: ParallelConfig, *, tensorwise_attention: bool = False) -> Environment:
    """Set the variables that `wanted` lists and the user has not set, if there is a GPU.

    Must be called before anything in this process starts CUDA. A second call returns the same.
    """
    global _in_force
    import torch

    if torch.cuda.device_count():  # counts by NVML, which does not start CUDA
        table = wanted(parallel, _compute_capability(), tensorwise_attention=tensorwise_attention)
        _in_force = apply(table, parallel)
    return _in_force


def in_force() -> Environment:
    """Return the result of `prepare`; empty before that call and without a GPU."""
    return _in_force


def wanted(
    parallel: ParallelConfig, capability: int | None, *, tensorwise_attention: bool = False
) -> dict[str, tuple[str, str]]:
    """Return the variables that a run with this layout needs: name -> (value, reason).

    Args:
        parallel: The layout.
        capability: The major compute capability of the GPUs; None (unknown) is treated as Hopper.
        tensorwise_attention: Whether attention is computed in FP8, and other layers with scales of
            the current tensor.
    """
    table = {
        "PYTORCH_ALLOC_CONF": (
            "expandable_segments:True",
            "prevents fragmentation of free memory",
        ),
        # megatron-core asserts this for its own CUDA graphs (transformer/cuda_graphs.py).
        "NCCL_GRAPH_REGISTER": (
            "0",
            "NCCL cannot register a CUDA graph's buffers that lie in expandable segments",
        ),
    }
    if parallel.world_size > 1:
        table["NCCL_NVLS_ENABLE"] = (
            "0",
            "reductions in the NVLink switches need additional buffers",
        )
    if _shares_layers(parallel) and (capability or _HOPPER) <= _HOPPER:
        table["CUDA_DEVICE_MAX_CONNECTIONS"] = (
            "1",
            "kernels start in launch order, communication before the computation that hides it",
        )
    if parallel.overlap and parallel.data_parallel_size > 1:
        margin = ("16", "norm kernels leave multiprocessors free for concurrent communication")
        table["NVTE_FWD_LAYERNORM_SM_MARGIN"] = margin
        table["NVTE_BWD_LAYERNORM_SM_MARGIN"] = margin
    if tensorwise_attention and (capability or _HOPPER) <= _HOPPER:
        table["NVTE_DPA_FP8_RECIPE"] = (
            "DelayedScaling",
            "on Hopper, cuDNN's attention in FP8 takes its scales from the micro-batch before",
        )
    return table


def apply(table: dict[str, tuple[str, str]], parallel: ParallelConfig) -> Environment:
    """Set the variables of a table that are not set yet under any of their names."""
    chosen: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, (value, _) in table.items():
        names = (name, *_ALIASES.get(name, ()))
        found = next((other for other in names if other in os.environ), name)
        in_environment = os.environ.setdefault(found, value)
        (chosen if in_environment == value else kept)[found] = in_environment
    return Environment(chosen, kept, _warning(kept, table, parallel))


def _shares_layers(parallel: ParallelConfig) -> bool:
    """Return whether ranks exchange activations within a layer."""
    return parallel.tensor_parallel_size > 1 or parallel.context_parallel_size > 1


def _warning(
    kept: dict[str, str], table: dict[str, tuple[str, str]], parallel: ParallelConfig
) -> str | None:
    """Return a warning if a variable set by the user prevents a configured overlap, else None."""
    overlaps = ("overlap", "tensor_parallel_overlap")
    enabled = [f"parallel.{name}=true" for name in overlaps if getattr(parallel, name)]
    if enabled and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        return (
            "CUDA_LAUNCH_BLOCKING is set, so the host waits for every kernel and "
            f"{' and '.join(enabled)} cannot hide any communication; unset it"
        )
    connections = "CUDA_DEVICE_MAX_CONNECTIONS"
    if parallel.tensor_parallel_overlap and connections in kept:
        value, why = table[connections]
        return (
            f"{connections}={kept[connections]} is set, so {enabled[-1]} "
            f"may not hide any communication; unset it: with {value}, {why}"
        )
    return None


def _compute_capability() -> int | None:
    """Return the major compute capability of the node's first GPU, or None if unknown.

    It is read from NVML, because torch would start CUDA.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu = ctypes.c_void_p()
    major = ctypes.c_int()
    minor = ctypes.c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu))
        or nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor))
    )
    return None if failed else major.value
