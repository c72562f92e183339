"""Random state as a pure function of (seed, step, rank): not saved, identical after any restart."""

import contextlib
from collections.abc import Iterator

import torch

from retemper.pipeline.config.derive_seed import derive_seed
from retemper.pipeline.distributed.topology import Topology


def seed_step(seed: int, step: int, topology: Topology) -> None:
    """Reset the random generators that dropout uses, for one training step.

    Tensor-parallel peers share the default generator's state (replicated activations need equal
    masks) and differ in megatron's model-parallel state (sharded activations need different masks).

    Args:
        seed: The run's seed.
        step: The step that is about to run.
        topology: This rank's position in the parallel layout.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    coordinates = (
        topology.data_parallel_rank,
        topology.pipeline_parallel_rank,
        topology.context_parallel_rank,
    )
    step_seed = derive_seed(seed, "step", step, *coordinates) % 2**31
    previous_states = get_cuda_rng_tracker().get_states()
    torch.manual_seed(step_seed)
    model_parallel_cuda_manual_seed(step_seed, use_cudagraphable_rng=topology.device.type == "cuda")
    # A CUDA graph keeps using the generators that it was captured with: they are seeded in place,
    # not replaced.
    states = get_cuda_rng_tracker().states_
    for name, generator in previous_states.items():
        if isinstance(generator, torch.Generator):
            states[name] = generator.manual_seed(states[name].initial_seed())


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators that dropout uses when the context ends."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().states_
    tracker_states = {name: _value(state) for name, state in states.items()}
    host_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        for name, value in tracker_states.items():
            if isinstance(states[name], torch.Generator):
                states[name].set_state(value)
            else:
                states[name] = value
        torch.cuda.set_rng_state(device_state)
        torch.set_rng_state(host_state)


def _value(state: torch.Generator | torch.Tensor) -> torch.Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state.clone()
