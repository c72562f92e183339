"""Canonical LoRA on megatron-core's sharded linear layers: one A and one B each for q, k, v, o, gate, up and down.

megatron fuses q, k, v into one layer and gate, up into another; the adapters stay separate, as peft has them.
Each adapted layer is a subclass of megatron's own, so the base weights keep their names in checkpoints.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, R rank of the adapter, I and O the
features in and out (this rank's part where the layer shards them).
"""

import contextlib
from functools import partial

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from retemper.pipeline.schema import LoraConfig


def use_adapters(layer: TransformerLayerSubmodules, lora: LoraConfig) -> None:
    """Let a layer spec build its targeted linear layers with adapters."""
    attention = layer.self_attention.submodules
    mlp = layer.mlp.keywords["submodules"]
    for submodules, name, adapted, targets in (
        (attention, "linear_qkv", LoraQkvLinear, ("q", "k", "v")),
        (attention, "linear_proj", LoraRowLinear, ("o",)),
        (mlp, "linear_fc1", LoraGateUpLinear, ("gate", "up")),
        (mlp, "linear_fc2", LoraRowLinear, ("down",)),
    ):
        if targeted := [target for target in targets if target in lora.targets]:
            setattr(submodules, name, partial(adapted, lora=lora, targets=targeted))


def freeze_base(model: torch.nn.Module) -> None:
    """Leave only adapter parameters trainable: the rest gets no gradient, no buffer and no optimizer state."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter or checkpoint key belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def scale_of(lora: LoraConfig) -> float:
    """What an update B·A is multiplied by."""
    return lora.alpha / lora.rank


class _Adapter(torch.nn.Module):
    """lora_A (R, I) and lora_B (O, R) of one linear layer."""

    def __init__(self, in_features: int, out_features: int, rank: int, config):
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.empty(rank, in_features, dtype=config.params_dtype))
        self.lora_B = torch.nn.Parameter(torch.empty(out_features, rank, dtype=config.params_dtype))


class _Dropout(torch.nn.Module):
    """Dropout of an adapter's input: equal masks on ranks that hold the same activation, different ones where it is sharded."""

    def __init__(self, probability: float, sharded_input: bool):
        super().__init__()
        self.probability, self.sharded_input = probability, sharded_input

    def forward(self, x_SBI: torch.Tensor) -> torch.Tensor:
        if not self.probability or not self.training:
            return x_SBI
        with get_cuda_rng_tracker().fork() if self.sharded_input else contextlib.nullcontext():
            return torch.nn.functional.dropout(x_SBI, self.probability)


class _LoraColumnLinear(ColumnParallelLinear):
    """A column-parallel layer with adapters: A on every rank, B sharded by output features as the base weight is."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale_of(lora)
        self.dropout = _Dropout(lora.dropout, sharded_input=self.sequence_parallel)
        self.adapters = torch.nn.ModuleDict(
            {name: _Adapter(self.input_size, self.output_sizes()[name], lora.rank, self.config) for name in targets}
        )
        for adapter in self.adapters.values():
            # Each rank sees its part of the sequence: megatron sums these gradients over the tensor-parallel group.
            adapter.lora_A.sequence_parallel = self.sequence_parallel
            adapter.lora_B.tensor_model_parallel = True
            adapter.lora_B.partition_dim = 0

    def output_sizes(self) -> dict[str, int]:
        """Output features of each target on this rank."""
        raise AssertionError("set by the layer")

    def combine(self, deltas: dict[str, torch.Tensor], like_SBO: torch.Tensor) -> torch.Tensor:
        """The targets' outputs in the fused layer's order."""
        raise AssertionError("set by the layer")

    def forward(self, input_, weight=None, runtime_gather_output=None):
        output_SBO, bias = super().forward(input_, weight, runtime_gather_output)
        x_SBI = self.dropout(input_)
        deltas = {name: self._delta(adapter, x_SBI) for name, adapter in self.adapters.items()}
        return output_SBO + self.combine(deltas, output_SBO), bias

    def _delta(self, adapter: _Adapter, x_SBI: torch.Tensor) -> torch.Tensor:
        hidden_SBR = torch.nn.functional.linear(x_SBI, adapter.lora_A)
        # The gradient of hidden is a sum over the ranks that hold a part of B: R numbers a token, not I.
        if self.sequence_parallel:
            hidden_SBR = gather_from_sequence_parallel_region(hidden_SBR, group=self.tp_group)
        else:
            hidden_SBR = copy_to_tensor_model_parallel_region(hidden_SBR, group=self.tp_group)
        return torch.nn.functional.linear(hidden_SBR, adapter.lora_B) * self.scale

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded_axis = {"weight": 0, "bias": 0} | {f"adapters.{name}.lora_B": 0 for name in self.adapters}
        return _sharded(self, sharded_axis, prefix, sharded_offsets, metadata)


class LoraQkvLinear(_LoraColumnLinear):
    """q, k, v: megatron interleaves them by query group, (group, [heads of q, k, v], head size)."""

    def output_sizes(self) -> dict[str, int]:
        tensor_parallel_size = self.config.tensor_model_parallel_size
        kv_size = self.config.kv_channels * self.config.num_query_groups // tensor_parallel_size
        return {"q": self.config.kv_channels * self.config.num_attention_heads // tensor_parallel_size, "k": kv_size, "v": kv_size}

    def combine(self, deltas, like_SBO):
        groups = self.config.num_query_groups // self.config.tensor_model_parallel_size
        leading = like_SBO.shape[:-1]
        parts = [
            (deltas[name] if name in deltas else like_SBO.new_zeros(*leading, size)).view(*leading, groups, -1)
            for name, size in self.output_sizes().items()
        ]
        return torch.cat(parts, dim=-1).view(like_SBO.shape)


class LoraGateUpLinear(_LoraColumnLinear):
    """gate and up: each rank holds its part of gate, then its part of up."""

    def output_sizes(self) -> dict[str, int]:
        return dict.fromkeys(("gate", "up"), self.output_size_per_partition // 2)

    def combine(self, deltas, like_SBO):
        size = self.output_size_per_partition // 2
        return torch.cat(
            [deltas[name] if name in deltas else like_SBO.new_zeros(*like_SBO.shape[:-1], size) for name in ("gate", "up")], dim=-1
        )


class LoraRowLinear(RowParallelLinear):
    """A row-parallel layer with an adapter: A sharded by input features as the base weight is, B on every rank."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale_of(lora)
        self.dropout = _Dropout(lora.dropout, sharded_input=True)
        (target,) = targets
        adapter = _Adapter(self.input_size_per_partition, self.output_size, lora.rank, self.config)
        adapter.lora_A.tensor_model_parallel = True
        adapter.lora_A.partition_dim = 1
        adapter.lora_B.sequence_parallel = self.sequence_parallel
        self.adapters = torch.nn.ModuleDict({target: adapter})

    def forward(self, input_):
        output_SBO, bias = super().forward(input_)
        (adapter,) = self.adapters.values()
        hidden_SBR = torch.nn.functional.linear(self.dropout(input_), adapter.lora_A)
        reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
        hidden_SBR = reduce(hidden_SBR, group=self.tp_group)
        return output_SBO + torch.nn.functional.linear(hidden_SBR, adapter.lora_B) * self.scale, bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded_axis = {"weight": 1} | {f"adapters.{name}.lora_A": 1 for name in self.adapters}
        return _sharded(self, sharded_axis, prefix, sharded_offsets, metadata)


def _sharded(layer, sharded_axis, prefix, sharded_offsets, metadata):
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        sharded_axis,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
