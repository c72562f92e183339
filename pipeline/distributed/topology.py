"""Ranks and process groups: who this rank is, how it joins and leaves."""

import datetime
import gc
import logging
import os
import shutil
import warnings
from dataclasses import dataclass

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig


@dataclass(frozen=True)
class Topology:
    """This rank's place: global rank, and index within each dimension of the parallel layout."""

    rank: int
    world_size: int
    local_world_size: int  # ranks of this node
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    context_parallel_rank: int
    data_parallel_rank: int
    data_parallel_size: int
    is_first_stage: bool
    is_last_stage: bool
    device: "torch.device"  # noqa: F821


def launched_world_size() -> int | None:
    """WORLD_SIZE as torchrun or Slurm set it; None outside a launcher."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def is_main_process() -> bool:
    """Whether this is global rank 0, also before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def trust_extra_state() -> None:
    """Let Transformer Engine read the state of delayed scaling, which it pickles: for checkpoints that a run of this config wrote."""
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"


def check_world_size(config: ModelSetup) -> None:
    """Refuse, before any process group starts, a launch whose rank count is not the config's. Raises UserError."""
    needed = config.parallel.world_size
    got = launched_world_size() or 1
    if needed != got:
        sizes = config.parallel
        raise UserError(
            f"The launch has {got} rank{'s' * (got != 1)}, but the config needs {needed} = tensor {sizes.tensor_parallel_size} × "
            f"pipeline {sizes.pipeline_parallel_size} × context {sizes.context_parallel_size} × data {sizes.data_parallel_size}. "
            f"Launch {needed} (torchrun --nproc-per-node …) or change parallel.*_size"
        )


def prepare_megatron() -> None:
    """Make megatron-core importable here: on CPU where there is no GPU, and without what it says about missing parts."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|streaming)\.")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for name in ("torch.utils.cpp_extension", "megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from retemper.pipeline.compat import megatron_cpu, megatron_save

    megatron_cpu.patch()
    megatron_save.patch()


def start(parallel: ParallelConfig) -> Topology:
    """Join the process group and build megatron's model- and data-parallel groups. Call `stop` before starting another."""
    prepare_megatron()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    if not torch.distributed.is_initialized():
        _join(torch)
        gc.freeze()  # what imports made never dies: without this each of megatron-core's collections looks at it anew, 0.4 s of every save
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual
        if (virtual := parallel.virtual_pipeline_parallel_size) > 1
        else None,
        context_parallel_size=parallel.context_parallel_size,
    )
    if torch.cuda.is_available():
        # Before a layer asks for it: the kind whose states a CUDA graph can draw from.
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
    """Destroy megatron's groups and, with leave, the process group under them."""
    import torch
    from megatron.core import parallel_state

    gc.collect()  # a model that is still there, and its CUDA graph, know their groups: NCCL would wait for the graph's end
    parallel_state.destroy_model_parallel()  # forgets its groups, but leaves them and their threads running
    if leave:
        torch.distributed.destroy_process_group()
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()  # models know their groups: what is left of the one before keeps its threads


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
        # CUDA records no graph of the default stream, and autograd works on the stream that a parameter was made on.
        torch.cuda.set_stream(torch.cuda.Stream())
        _check_shared_memory(int(os.environ["LOCAL_WORLD_SIZE"]))
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=10)
    )


def _check_shared_memory(local_world_size: int, folder: str = "/dev/shm") -> None:
    """NCCL's ranks of one node talk through shared memory, and a container has 64 MiB of it unless told: a bus error later on."""
    needed = local_world_size * 64 << 20
    free = shutil.disk_usage(folder).free
    if local_world_size > 1 and free < needed:
        raise UserError(
            f"{folder} has {free >> 20} MiB free, {local_world_size} ranks on one node need {needed >> 20}: "
            "start the container with --ipc=host or --shm-size=8g, or remove what earlier runs left there"
        )


def local_device(torch):
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
