"""Ranks and process groups: identify this rank, join the groups and leave them."""

import datetime
import gc
import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Topology:
    """This rank's global rank and its index in each dimension of the parallel layout."""

    rank: int
    world_size: int
    local_world_size: int  # number of ranks on this node
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    context_parallel_rank: int
    data_parallel_rank: int
    data_parallel_size: int
    is_first_stage: bool
    is_last_stage: bool
    device: "torch.device"


def launched_world_size() -> int | None:
    """Return WORLD_SIZE as set by torchrun or Slurm; None outside a launcher."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def is_main_process() -> bool:
    """Return whether this is global rank 0, even before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def check_world_size(config: ModelSetup) -> None:
    """Check, before any process group starts, that the launch has the config's number of ranks.

    Raises:
        UserError: If it has another number of ranks.
    """
    required = config.parallel.world_size
    launched = launched_world_size() or 1
    if required != launched:
        sizes = config.parallel
        raise UserError(
            f"The launch has {launched} rank{'s' * (launched != 1)}, "
            f"but the config needs {required} = tensor {sizes.tensor_parallel_size} × "
            f"pipeline {sizes.pipeline_parallel_size} × "
            f"context {sizes.context_parallel_size} × data {sizes.data_parallel_size}. "
            f"Launch {required} (torchrun --nproc-per-node …) or change parallel.*_size"
        )


def prepare_megatron() -> None:
    """Make megatron-core importable: on CPU if there is no GPU.

    Warnings and log messages about missing optional components are silenced.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch|streaming)\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("torch.utils.cpp_extension", "megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from retemper.pipeline.compat import light_imports, megatron_cpu, megatron_save

    with light_imports.megatron_without_wandb():
        megatron_cpu.patch()
        megatron_save.patch()
    import torch

    from retemper.pipeline.compat import safe_pickles

    safe_pickles.patch()

    if not torch.cuda.is_available():
        light_imports.optimizers_without_dynamo()


def start(parallel: ParallelConfig) -> Topology:
    """Join the process group and build megatron's model- and data-parallel groups.

    Call `stop` before starting another layout.

    Collective: every rank must call this.
    """
    prepare_megatron()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    if not torch.distributed.is_initialized():
        _join(torch)
        # Objects created by imports live forever: without freezing them each of megatron-core's
        # garbage collections scans them again, which takes 0.4 s of every save.
        gc.freeze()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual
        if (virtual := parallel.virtual_pipeline_parallel_size) > 1
        else None,
        context_parallel_size=parallel.context_parallel_size,
    )
    if torch.cuda.is_available():
        # Before any layer creates the tracker: a CUDA graph can use only this kind of states.
        initialize_rng_tracker(use_cudagraphable_rng=True)
    return Topology(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        device=local_device(torch),
    )


def stop(*, leave: bool = True) -> None:
    """Destroy megatron's groups.

    Args:
        leave: Also destroy the default process group.

    Collective: every rank must call this.
    """
    import torch
    from megatron.core import parallel_state

    # An unreachable model and its CUDA graph still refer to their groups, and NCCL would wait for
    # the end of the graph.
    gc.collect()
    # This drops megatron's references to the groups; the groups and their threads keep running.
    parallel_state.destroy_model_parallel()
    if leave:
        torch.distributed.destroy_process_group()
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    # Models refer to their groups: the remains of the previous model would keep its threads alive.
    gc.collect()


def _join(torch) -> None:
    for variable, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(variable, value)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # CUDA cannot capture a graph on the default stream, and autograd uses the stream on which a
        # parameter was created.
        torch.cuda.set_stream(torch.cuda.Stream())
        _check_shared_memory(int(os.environ["LOCAL_WORLD_SIZE"]))
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=10)
    )


def _check_shared_memory(local_world_size: int, folder: str = "/dev/shm") -> None:
    """Check that the ranks of one node have enough shared memory for NCCL.

    NCCL communicates through it within a node. A container has only 64 MiB by default, which leads
    to a bus error later on.
    """
    required = local_world_size * 64 << 20
    free = shutil.disk_usage(folder).free
    if local_world_size > 1 and free < required:
        raise UserError(
            f"{folder} has {free >> 20} MiB free, but {local_world_size} ranks on one node need "
            f"{required >> 20} MiB: start the container with --ipc=host or --shm-size=8g, "
            "or remove files of earlier runs from it"
        )


def local_device(torch):
    """Return this rank's torch.device: its current CUDA device, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
