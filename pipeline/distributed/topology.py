"""Ranks and process groups. The only module of the house that touches megatron's parallel_state or RANK and WORLD_SIZE."""

import contextlib
import ctypes
import datetime
import gc
import logging
import os
import shutil
import signal
import sys
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


_asked_to_stop = False


def follow_launcher() -> None:
    """End this rank at once on Ctrl-C, and when its torchrun agent dies: an orphan would go on writing into the run's folder."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # commits are atomic: there is nothing to unwind
    if launched_world_size() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def noting_signals():
    """Within it SIGTERM and SIGUSR1, which schedulers send before they end a job, end nothing: asked_to_stop tells of them."""

    def note(*_signal) -> None:
        global _asked_to_stop
        _asked_to_stop = True

    before = {asks: signal.signal(asks, note) for asks in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for asks, handler in before.items():
            signal.signal(asks, handler)


def asked_to_stop() -> bool:
    """Whether any rank has had a signal to stop. Every rank calls it."""
    import torch

    asked = torch.tensor(int(_asked_to_stop), device=_device(torch))
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked)


def trust_extra_state() -> None:
    """Let Transformer Engine read the state of delayed scaling, which it pickles: for checkpoints that a run of this config wrote."""
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"


def check_world_size(config: ModelSetup) -> None:
    """Refuse, before any process group starts, a launch whose rank count is not the config's. Raises UserError."""
    needed, got = config.parallel.world_size, launched_world_size() or 1
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
    from retemper.pipeline.distributed import cpu

    cpu.patch()


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
        virtual_pipeline_model_parallel_size=virtual if (virtual := parallel.virtual_pipeline_parallel_size) > 1 else None,
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
        device=_device(torch),
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


def from_last_stage(values: "torch.Tensor") -> list[float]:  # noqa: F821
    """Sum values over data- and context-parallel ranks of the last pipeline stage, and hand the result to every rank.

    values: one dimension, of one length on every rank; only the last stage's count. The host waits once, for the result.
    """
    import torch
    from megatron.core import parallel_state

    summed = values.to(_device(torch), torch.float64)
    if parallel_state.is_pipeline_last_stage():
        torch.distributed.all_reduce(summed, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        summed, parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group()
    )
    return summed.tolist()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Values summed over all ranks."""
    import torch

    summed = torch.tensor(values, dtype=torch.float64, device=_device(torch))
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def from_each_replica(value) -> list:
    """The picklable values of the data-parallel replicas of this rank's part of the model, in order, on every rank."""
    import torch
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    values = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def sum_over_stages(counts: list[int]) -> list[int]:
    """Whole numbers summed over the pipeline stages of a model."""
    import torch
    from megatron.core import parallel_state

    summed = torch.tensor(counts, dtype=torch.int64, device=_device(torch))
    torch.distributed.all_reduce(summed, group=parallel_state.get_pipeline_model_parallel_group())
    return summed.tolist()


def anywhere_in_model(flags: "np.ndarray") -> "np.ndarray":  # noqa: F821
    """Which of the flags, bool (n,), are set on any tensor-, pipeline- or context-parallel peer."""
    import torch
    from megatron.core import parallel_state

    count = torch.from_numpy(flags.astype("int32")).to(_device(torch))
    for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
        torch.distributed.all_reduce(count, group=group)
    return count.cpu().numpy() > 0


def barrier() -> None:
    """Wait for every rank."""
    import torch

    torch.distributed.barrier()


def from_rank_zero(value):
    """Rank 0's picklable value on every rank."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(function, *arguments):
    """What a function gives on rank 0, or the UserError that it raises there, on every rank."""
    outcome = None
    if is_main_process():
        try:
            outcome = function(*arguments), None
        except UserError as error:
            outcome = None, str(error)
    result, problem = from_rank_zero(outcome)
    if problem:
        raise UserError(problem)
    return result


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
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=10))


def _check_shared_memory(local_world_size: int, folder: str = "/dev/shm") -> None:
    """NCCL's ranks of one node talk through shared memory, and a container has 64 MiB of it unless told: a bus error later on."""
    needed, free = local_world_size * 64 << 20, shutil.disk_usage(folder).free
    if local_world_size > 1 and free < needed:
        raise UserError(
            f"{folder} has {free >> 20} MiB free, {local_world_size} ranks on one node need {needed >> 20}: "
            "start the container with --ipc=host or --shm-size=8g, or remove what earlier runs left there"
        )


def _device(torch):
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
