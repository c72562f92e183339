"""Random state as a pure function of (seed, step, rank): nothing to save, the same after any restart."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from retemper.pipeline.distributed.topology import Topology


def derive_seed(*parts) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and Python."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_step(seed: int, step: int, topology: Topology) -> None:
    """Reset the generators that dropout draws from.

    Tensor-parallel peers share the default state (replicated activations need equal masks) and differ in
    megatron's model-parallel state (sharded activations need different ones).
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    place = (
        topology.data_parallel_rank,
        topology.pipeline_parallel_rank,
        topology.context_parallel_rank,
    )
    step_seed = derive_seed(seed, "step", step, *place) % 2**31
    known = get_cuda_rng_tracker().get_states()
    torch.manual_seed(step_seed)
    model_parallel_cuda_manual_seed(step_seed, use_cudagraphable_rng=topology.device.type == "cuda")
    # A recorded graph draws from the generators that it was recorded with: they are seeded, not replaced.
    states = get_cuda_rng_tracker().states_
    for name, generator in known.items():
        if isinstance(generator, torch.Generator):
            states[name] = generator.manual_seed(states[name].initial_seed())


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Within it numbers may be drawn: the generators that dropout draws from are afterwards as before."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().states_
    before = {name: _value(state) for name, state in states.items()}
    on_host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        for name, value in before.items():
            if isinstance(states[name], torch.Generator):
                states[name].set_state(value)
            else:
                states[name] = value
        torch.cuda.set_rng_state(on_device)
        torch.set_rng_state(on_host)


def _value(state: torch.Generator | torch.Tensor) -> torch.Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state.clone()
