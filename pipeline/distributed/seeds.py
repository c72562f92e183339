"""Random state as a pure function of (seed, step, rank): nothing to save, the same after any restart."""

import hashlib

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
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    place = topology.data_parallel_rank, topology.pipeline_parallel_rank, topology.context_parallel_rank
    step_seed = derive_seed(seed, "step", step, *place) % 2**31
    torch.manual_seed(step_seed)
    model_parallel_cuda_manual_seed(step_seed)
