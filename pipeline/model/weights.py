"""Initial weights as a function of parameter names and the seed, independent of the topology."""

import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from retemper.pipeline.config.derive_seed import derive_seed
from retemper.pipeline.schema.model import ModelConfig


@torch.no_grad()
def init_weights(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Initialise every parameter of this rank's shard.

    Each one is a slice of a random tensor that is drawn for the whole parameter, so that all
    topologies start from the same values.

    Args:
        model: One stage on this rank.
        config: Its init_std and num_layers set the standard deviations.
        seed: The run's seed.
    """
    state = model.sharded_state_dict()
    apply_factories(state)
    for tensor in _sharded_tensors(state):
        tensor.data.copy_(_whole_tensor(tensor, config, seed)[_local_slice(tensor)])


def _sharded_tensors(state: dict) -> list[ShardedTensor]:
    sharded, _ = extract_sharded_tensors(state)
    tensors = []
    torch.utils._pytree.tree_map(
        lambda leaf: tensors.append(leaf) if isinstance(leaf, ShardedTensor) else None, sharded
    )
    return tensors


def _local_slice(tensor: ShardedTensor) -> tuple[slice, ...]:
    """Return the index of this rank's shard within the whole parameter."""
    offsets = tensor.global_offset[tensor.prepend_axis_num :]
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(offsets, tensor.data.shape, strict=True)
    )


def _whole_tensor(tensor: ShardedTensor, config: ModelConfig, seed: int) -> torch.Tensor:
    # megatron stacks the layers of a block along prepended axes: the offset along these is the
    # layer's global number.
    """Return the initial value of a whole parameter, before sharding."""
    layer = tensor.global_offset[: tensor.prepend_axis_num]
    shape = tensor.global_shape[tensor.prepend_axis_num :]
    generator = torch.Generator().manual_seed(derive_seed(seed, "init", tensor.key, *layer))
    name = tensor.key
    if name.endswith("norm_weight") or name.endswith("norm.weight"):
        return torch.ones(shape)
    # The latter two are set from the base weights later.
    if name.endswith((".lora_B", ".bias", "_initial", ".lora_magnitude")):
        return torch.zeros(shape)
    if name.endswith("lora_A"):
        # Kaiming uniform with a = sqrt(5), as in peft: the bound is 1 / sqrt(in_features).
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    # Output projections are scaled down by the depth of the residual stream (GPT-2, section 2.3).
    residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    return torch.empty(shape).normal_(0, std, generator=generator)
