"""Initial weights that depend on a parameter's name and the seed alone, never on the topology."""

import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors

from retemper.pipeline.distributed.seeds import derive_seed
from retemper.pipeline.schema.model import ModelConfig


@torch.no_grad()
def init_weights(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of this rank's shard with its slice of a tensor drawn for the whole parameter."""
    state = model.sharded_state_dict()
    apply_factories(state)
    for tensor in _sharded_tensors(state):
        tensor.data.copy_(_whole_tensor(tensor, config, seed)[_local_slice(tensor)])


def _sharded_tensors(state: dict) -> list[ShardedTensor]:
    sharded, _ = extract_sharded_tensors(state)
    found = []
    torch.utils._pytree.tree_map(
        lambda leaf: found.append(leaf) if isinstance(leaf, ShardedTensor) else None, sharded
    )
    return found


def _local_slice(tensor: ShardedTensor) -> tuple[slice, ...]:
    offsets = tensor.global_offset[tensor.prepend_axis_num :]
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(offsets, tensor.data.shape, strict=True)
    )


def _whole_tensor(tensor: ShardedTensor, config: ModelConfig, seed: int) -> torch.Tensor:
    # megatron stacks the layers of a block along prepended axes: the offset there is the layer's global number.
    layer = tensor.global_offset[: tensor.prepend_axis_num]
    shape = tensor.global_shape[tensor.prepend_axis_num :]
    generator = torch.Generator().manual_seed(derive_seed(seed, "init", tensor.key, *layer))
    name = tensor.key
    if name.endswith("norm_weight") or name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(
        (".lora_B", ".bias", "_initial", ".lora_magnitude")
    ):  # the latter two follow from the base's weights
        return torch.zeros(shape)
    if name.endswith("lora_A"):
        # Kaiming uniform with a = sqrt(5), as peft: the bound is 1 / sqrt(in_features).
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    # Output projections are scaled down by the depth of the residual stream (GPT-2, section 2.3).
    residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    return torch.empty(shape).normal_(0, std, generator=generator)
