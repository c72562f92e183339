"""What ranks exchange beside tensors of the model; every rank of the named group must call."""

from retemper.pipeline.distributed.topology import is_main_process, local_device
from retemper.pipeline.errors import UserError


def from_last_stage(values: "torch.Tensor") -> list[float]:  # noqa: F821
    """Sum values over data- and context-parallel ranks of the last pipeline stage, and hand the result to every rank.

    values: one dimension, of one length on every rank; only the last stage's count. The host waits once, for the result.
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


def sum_over_ranks(values: list[float]) -> list[float]:
    """Values summed over all ranks."""
    import torch

    summed = torch.tensor(values, dtype=torch.float64, device=local_device(torch))
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

    summed = torch.tensor(counts, dtype=torch.int64, device=local_device(torch))
    torch.distributed.all_reduce(summed, group=parallel_state.get_pipeline_model_parallel_group())
    return summed.tolist()


def anywhere_in_model(flags: "np.ndarray") -> "np.ndarray":  # noqa: F821
    """Which of the flags, bool (n,), are set on any tensor-, pipeline- or context-parallel peer."""
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
