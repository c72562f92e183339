"""Compare `retemper plan` with a built model and a training step. probes.py runs this module."""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Held(TorchDispatchMode):
    """The mode that counts the bytes of all live tensors created under it, and their peak.

    torch's profiler, which also sees the workspaces of kernels, misses what gloo's threads free; on
    one rank both agree (docs/dev/log.md).
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._see, output)
        return output

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def counts(config, place, model) -> None:
    """Check the plan's parameters against the model: all of them, and the bytes on this rank."""
    from retemper.pipeline.estimate import memory
    from retemper.pipeline.model.build import parameter_counts

    assert memory.parameter_counts(config) == parameter_counts(
        model, config.parallel.tensor_parallel_size
    )
    held = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    planned = memory.rank_memory(config, place.pipeline_parallel_rank)
    assert (planned.weights + planned.adapters, planned.gradients) == (held, 4 * trained)


def memory(config, place, _model) -> None:
    """Check that the plan's memory of this rank is within a tenth of the peak of its tensors.

    The peak is over building the model, two steps and scoring.
    """
    from retemper.pipeline.checkpoint.state import TrainState
    from retemper.pipeline.estimate.memory import rank_memory
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.model.graph import Passes
    from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
    from retemper.pipeline.train.step import train_step

    planned = rank_memory(config, place.pipeline_parallel_rank, fused=False)
    with Held() as held:
        model = build_model(config, place)
        optimizer = build_optimizer(config, model)
        schedule = build_schedule(config, optimizer)
        for _step in range(2):
            count = config.train.global_batch_size // config.parallel.data_parallel_size
            batches = drawn_batches(config, place, count, config.train.micro_batch_size)
            train_step(config, TrainState(), Passes(config, model), optimizer, schedule, batches)
            del batches
        if config.evals.heldout:
            with torch.no_grad():
                # As held-out samples are dealt out to data-parallel ranks.
                mine = -(-config.evals.max_samples // config.parallel.data_parallel_size)
                count = min(config.evals.micro_batch_size, mine)
                run_schedule(
                    model.eval(), drawn_batches(config, place, count, count), forward_only=True
                )
    off = planned.total / held.peak - 1
    print(
        f"planned {planned.total:,} of {held.peak:,} measured bytes ({off:+.2%}): {planned}",
        flush=True,
    )
    assert abs(off) < 0.1, f"{planned} is {off:+.1%} of {held.peak:,}"


def drawn_batches(config, place, count, micro_batch_size):
    """Return this rank's micro-batches of `count` samples of random tokens."""
    from retemper.pipeline.data.batch import make_batches
    from retemper.pipeline.data.mds import Samples

    samples = Samples(count, config.data.seq_length)
    whole = np.array([config.data.seq_length], "<u4").tobytes()
    samples.pieces |= {
        "lengths": [whole] * len(samples),
        "prompt_lengths": [bytes(4)] * len(samples),
    }
    samples.tokens_NT[:] = np.random.default_rng(0).integers(
        config.model.vocab_size, size=samples.tokens_NT.shape
    )
    batches = make_batches(samples, micro_batch_size, mask_documents=False)
    return [
        batch.shard_for_context_parallel(
            place.context_parallel_rank, config.parallel.context_parallel_size
        )
        for batch in batches
    ]
