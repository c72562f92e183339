"""The environment variables that a fast run on GPUs needs, in one table.

What the person has set stays as it is. CUDA, NCCL, Transformer Engine and torch's allocator each
read them once, when they start: `prepare` comes before any of them. The values are of NVIDIA's
performance recipes (Megatron-Bridge, scripts/performance) except TORCH_NCCL_AVOID_RECORD_STREAMS:
torch does so by itself since 2.8, and warns where the variable is set.
"""

import ctypes
import os
from dataclasses import dataclass, field

from retemper.pipeline.schema.model import ParallelConfig

_HOPPER = 9  # its major compute capability

# Other names under which torch takes the same setting; torch 2.10 and 2.11 warn of this one.
_ALIASES = {"PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF",)}


@dataclass(frozen=True)
class Environment:
    """The variables of the table, as they are in force in this process."""

    chosen: dict[str, str] = field(default_factory=dict)  # of the table's value, set here or before
    kept: dict[str, str] = field(default_factory=dict)  # the person's, other than the table's
    warning: str | None = None  # why an overlap that the config asks for may not happen

    def __str__(self) -> str:
        """In one line, empty where the table is."""
        parts = [f"{name}={value}" for name, value in self.chosen.items()]
        parts += [f"{name}={value} (as it was set)" for name, value in self.kept.items()]
        return ", ".join(parts)


_in_force = Environment()


def prepare(parallel: ParallelConfig) -> Environment:
    """Set what `wanted` lists and the person has not, where there is a GPU.

    To be called before anything in this process starts CUDA. A second call finds the same.
    """
    global _in_force
    import torch

    if torch.cuda.device_count():  # answered by NVML, which starts nothing
        _in_force = apply(wanted(parallel, _compute_capability()), parallel)
    return _in_force


def in_force() -> Environment:
    """What `prepare` found and set; empty before it and without a GPU."""
    return _in_force


def wanted(parallel: ParallelConfig, capability: int | None) -> dict[str, tuple[str, str]]:
    """The variables that a run with this layout wants: the value of each, and why.

    capability: the major compute capability of the GPUs; None, for unknown, counts as Hopper's.
    """
    table = {
        "PYTORCH_ALLOC_CONF": (
            "expandable_segments:True",
            "free memory is not lost between blocks of other sizes",
        ),
        # Asserted by megatron-core for its own graphs (transformer/cuda_graphs.py).
        "NCCL_GRAPH_REGISTER": (
            "0",
            "NCCL cannot use buffers in expandable segments that a CUDA graph registers with it",
        ),
    }
    if parallel.world_size > 1:
        table["NCCL_NVLS_ENABLE"] = ("0", "reducing in the switches of NVLink takes more buffers")
    if _shares_layers(parallel) and (capability or _HOPPER) <= _HOPPER:
        table["CUDA_DEVICE_MAX_CONNECTIONS"] = (
            "1",
            "kernels start in the order of their calls, communication before what is to hide it",
        )
    if parallel.overlap and parallel.data_parallel_size > 1:
        margin = ("16", "norms leave multiprocessors to the communication beside them")
        table["NVTE_FWD_LAYERNORM_SM_MARGIN"] = margin
        table["NVTE_BWD_LAYERNORM_SM_MARGIN"] = margin
    return table


def apply(table: dict[str, tuple[str, str]], parallel: ParallelConfig) -> Environment:
    """Set the variables of a table that are not set yet, under any of their names."""
    chosen = {}
    kept = {}
    for name, (value, _) in table.items():
        names = (name, *_ALIASES.get(name, ()))
        found = next((other for other in names if other in os.environ), name)
        in_environment = os.environ.setdefault(found, value)
        (chosen if in_environment == value else kept)[found] = in_environment
    return Environment(chosen, kept, _warning(kept, table, parallel))


def _shares_layers(parallel: ParallelConfig) -> bool:
    """Whether ranks exchange activations within a layer."""
    return parallel.tensor_parallel_size > 1 or parallel.context_parallel_size > 1


def _warning(
    kept: dict[str, str], table: dict[str, tuple[str, str]], parallel: ParallelConfig
) -> str | None:
    """Of an overlap that the config asks for and a variable of the person's forbids."""
    overlaps = ("overlap", "tensor_parallel_overlap")
    asked = [f"parallel.{name}=true" for name in overlaps if getattr(parallel, name)]
    if asked and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        return (
            "CUDA_LAUNCH_BLOCKING is set, with which every kernel is waited for: "
            f"{' and '.join(asked)} can hide no communication; unset it"
        )
    connections = "CUDA_DEVICE_MAX_CONNECTIONS"
    if parallel.tensor_parallel_overlap and connections in kept:
        value, why = table[connections]
        return (
            f"{connections}={kept[connections]} is set, with which {asked[-1]} "
            f"may hide no communication; unset it: with {value}, {why}"
        )
    return None


def _compute_capability() -> int | None:
    """The major one of the node's first GPU, from NVML (torch would start CUDA), or None."""
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
