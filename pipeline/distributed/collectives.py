"""Collectives for values other than the model's tensors."""

from typing import TYPE_CHECKING

from retemper.pipeline.distributed.topology import is_main_process, local_device
from retemper.pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch


def all_reduce_from_last_stage(values: "torch.Tensor") -> list[float]:
    """Sum values over the data- and context-parallel ranks of the last pipeline stage.

    The host waits once, for the result.

    Args:
        values: One-dimensional, with the same length on every rank; only those of the last stage
            are summed.

    Returns:
        The sums, on every rank.

    Collective: every rank must call this.
    """
    import torch
    from megatron.core import parallel_state

    summed = values.to(local_device(torch), torch.float64)
    if parallel_state.is_pipeline_last_stage():
        torch.distributed.all_reduce(
            summed, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
    torch.distributed.broadcast(
        summed,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return summed.tolist()


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the element-wise sums of the values over all ranks.

    Collective: every rank must call this.
    """
    import torch

    summed = torch.tensor(values, dtype=torch.float64, device=local_device(torch))
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def all_gather_data_parallel(value) -> list:
    """Return the values of all data-parallel replicas, in the order of the replicas.

    Every rank receives the values of its peers in the data-parallel group, the ranks that have the
    same part of the model. The value must be picklable.

    Collective: every rank must call this.
    """
    import torch
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    values = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def all_reduce_over_stages(counts: list[int]) -> list[int]:
    """Return the element-wise sums of integer counts over the pipeline stages of a model.

    Collective: every rank must call this.
    """
    import torch
    from megatron.core import parallel_state

    summed = torch.tensor(counts, dtype=torch.int64, device=local_device(torch))
    torch.distributed.all_reduce(summed, group=parallel_state.get_pipeline_model_parallel_group())
    return summed.tolist()


def any_model_parallel_rank(flags: "np.ndarray") -> "np.ndarray":
    """Return which flags are set on any tensor-, pipeline- or context-parallel peer.

    Both the flags and the result are bool (n,).

    Collective: every rank must call this.
    """
    import torch
    from megatron.core import parallel_state

    count = torch.from_numpy(flags.astype("int32")).to(local_device(torch))
    for group in (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
    ):
        torch.distributed.all_reduce(count, group=group)
    return count.cpu().numpy() > 0


def barrier() -> None:
    """Wait until every rank has reached this call.

    Collective: every rank must call this.
    """
    import torch

    torch.distributed.barrier()


def broadcast_from_rank0(value):
    """Return rank 0's value, which must be picklable, on every rank.

    Collective: every rank must call this.
    """
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(function, *arguments):
    """Call a function on rank 0 and return its result on every rank.

    Raises:
        UserError: On every rank, if the function raises it on rank 0.

    Collective: every rank must call this.
    """
    outcome = None
    if is_main_process():
        try:
            outcome = function(*arguments), None
        except UserError as error:
            outcome = None, str(error)
    result, problem = broadcast_from_rank0(outcome)
    if problem:
        raise UserError(problem)
    return result
