"""Canonical LoRA on megatron-core's sharded linear layers: one A and one B each for q, k, v, o, gate, up and down.

megatron fuses q, k, v into one layer and gate, up into another; the adapters stay separate, as peft has them.
Each adapted layer is a subclass of megatron's own, so the base weights keep their names in checkpoints.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, R rank of the adapter, I and O the
features in and out (this rank's part where the layer shards them).
"""

import contextlib
import math
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
        parameter.requires_grad_(is_adapter(name) and not name.endswith("_initial"))


def check_what_trains(trainable: dict[str, bool], lora: LoraConfig | None) -> None:
    """Refuse a model of which something else trains than its method says: LoRA never becomes full training, nor the reverse.

    trainable: parameter -> whether it trains, of layers that every target stands on.
    """
    if lora is None:
        assert all(trainable.values()), f"full training, but frozen: {[name for name in trainable if not trainable[name]]}"
        return
    training = {name for name, trains in trainable.items() if trains}
    assert all(map(is_adapter, training)), f"LoRA, but not of adapters alone: {sorted(name for name in training if not is_adapter(name))}"
    missing = set(lora.targets) - {name.split(".")[-2] for name in training}
    assert not missing, f"the targets {sorted(missing)} stand on no layer"


@torch.no_grad()
def begin_at_base(model: torch.nn.Module) -> None:
    """Set what of the adapters begins as a function of the base's weights, once those are loaded."""
    for layer in model.modules():
        if isinstance(layer, _LoraColumnLinear | LoraRowLinear):
            layer.begin_at_base()


def is_adapter(name: str) -> bool:
    """Whether a parameter or checkpoint key belongs to an adapter."""
    return name.rpartition(".")[2].startswith("lora_")


def scale_of(lora: LoraConfig) -> float:
    """What an update B·A is multiplied by; rsLoRA (arXiv 2312.03732) divides by the root of the rank."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


class _Adapter(torch.nn.Module):
    """lora_A (R, I) and lora_B (O, R) of one linear layer.

    With DoRA lora_magnitude (O,); with PiSSA the factors at the start, frozen: they are taken off again, so that the base's
    weights stay as they are.
    """

    def __init__(self, in_features: int, out_features: int, lora: LoraConfig, config):
        super().__init__()

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))

        self.lora_A, self.lora_B = parameter(lora.rank, in_features), parameter(out_features, lora.rank)
        if lora.pissa:
            self.lora_A_initial, self.lora_B_initial = parameter(lora.rank, in_features), parameter(out_features, lora.rank)
        if lora.dora:
            self.lora_magnitude = parameter(out_features)

    def sharded_axes(self, *, of_A: int | None = None, of_B: int | None = None, of_magnitude: int | None = None) -> dict[str, int]:
        """parameter -> the axis that tensor parallelism cuts, of those that it cuts."""
        axes = {"lora_A": of_A, "lora_A_initial": of_A, "lora_B": of_B, "lora_B_initial": of_B, "lora_magnitude": of_magnitude}
        return {name: axis for name, axis in axes.items() if axis is not None and hasattr(self, name)}

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the whole update, in PiSSA's case of twice the rank."""
        return joined_factors(dict(self.named_parameters()))

    def begin(self, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
        for parameter, value in zip(
            (self.lora_A, self.lora_A_initial, self.lora_B, self.lora_B_initial), (A_RI, A_RI, B_OR, B_OR), strict=True
        ):
            parameter.copy_(value)


def joined_factors(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, I) and B (O, R) of the update that an adapter's parameters stand for."""
    A_RI, B_OR = parameters["lora_A"], parameters["lora_B"]
    if "lora_A_initial" not in parameters:
        return A_RI, B_OR
    return torch.cat([A_RI, parameters["lora_A_initial"]]), torch.cat([B_OR, -parameters["lora_B_initial"]], dim=1)


def principal_factors(weight_OI: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA (arXiv 2404.02948): A and B with scale · B·A the best approximation of the weight at that rank."""
    U, S, Vh = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    signs = torch.where(Vh[:rank].gather(1, Vh[:rank].abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)  # an SVD's signs are arbitrary
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank] * signs, U[:, :rank] * root * signs.T


@torch.no_grad()
def row_norms(weight_OI, A_RI, B_OR, scale: float, total=lambda part: part) -> torch.Tensor:
    """Norm of each row of W + scale · B·A, (O,), as DoRA divides by (arXiv 2402.09353), without making that matrix.

    total: sums over the ranks that hold parts of the input features.
    """
    weight_OI, A_RI, B_OR = weight_OI.float(), A_RI.float(), B_OR.float()
    squares, crossed, gram = total(weight_OI.square().sum(1)), total(weight_OI @ A_RI.T), total(A_RI @ A_RI.T)
    return (squares + 2 * scale * (crossed * B_OR).sum(1) + scale**2 * ((B_OR @ gram) * B_OR).sum(1)).clamp_min(0).sqrt()


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
        self.lora, self.scale = lora, scale_of(lora)
        self.dropout = _Dropout(lora.dropout, sharded_input=self.sequence_parallel)
        self.adapters = torch.nn.ModuleDict(
            {name: _Adapter(self.input_size, self.output_sizes()[name], lora, self.config) for name in targets}
        )
        for adapter in self.adapters.values():
            # Each rank sees its part of the sequence: megatron sums these gradients over the tensor-parallel group.
            adapter.lora_A.sequence_parallel = self.sequence_parallel
            _mark(adapter, adapter.sharded_axes(of_B=0, of_magnitude=0))

    def output_sizes(self) -> dict[str, int]:
        """Output features of each target on this rank."""
        raise AssertionError("set by the layer")

    def combine(self, deltas: dict[str, torch.Tensor], like_SBO: torch.Tensor) -> torch.Tensor:
        """The targets' outputs in the fused layer's order."""
        raise AssertionError("set by the layer")

    def split(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each target's part of the fused layer's output features, which are the last axis: what combine puts together."""
        raise AssertionError("set by the layer")

    def forward(self, input_, weight=None, runtime_gather_output=None):
        output_SBO, bias = super().forward(input_, weight, runtime_gather_output)
        x_SBI = self.dropout(input_)
        deltas = {name: self._delta(adapter, x_SBI) for name, adapter in self.adapters.items()}
        if self.lora.dora:
            plain = self.split(output_SBO if self.bias is None else output_SBO - self.bias)
            deltas = {name: _turned(self.adapters[name], self._row_norms(name), plain[name], delta) for name, delta in deltas.items()}
        return output_SBO + self.combine(deltas, output_SBO), bias

    def begin_at_base(self) -> None:
        for name, adapter in self.adapters.items():
            if self.lora.pissa:
                weight_OI = _gather(self.split(self.weight.t())[name].t(), 0, self.tp_group)
                A_RI, B_OR = principal_factors(weight_OI, self.lora.rank, self.scale)
                adapter.begin(A_RI, B_OR.chunk(self.tp_group.size())[self.tp_group.rank()])
            if self.lora.dora:
                adapter.lora_magnitude.copy_(self._row_norms(name))

    def _row_norms(self, name: str) -> torch.Tensor:
        return row_norms(self.split(self.weight.t())[name].t(), *self.adapters[name].factors, self.scale)

    def _delta(self, adapter: _Adapter, x_SBI: torch.Tensor) -> torch.Tensor:
        A_RI, B_OR = adapter.factors
        hidden_SBR = torch.nn.functional.linear(x_SBI, A_RI)
        # The gradient of hidden is a sum over the ranks that hold a part of B: R numbers a token, not I.
        if self.sequence_parallel:
            hidden_SBR = gather_from_sequence_parallel_region(hidden_SBR, group=self.tp_group)
        else:
            hidden_SBR = copy_to_tensor_model_parallel_region(hidden_SBR, group=self.tp_group)
        return torch.nn.functional.linear(hidden_SBR, B_OR) * self.scale

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        axes = {"of_B": 0, "of_magnitude": 0}
        return _sharded(self, {"weight": 0, "bias": 0} | _named_axes(self.adapters, **axes), prefix, sharded_offsets, metadata)


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

    def split(self, fused):
        sizes = self.output_sizes()
        groups = self.config.num_query_groups // self.config.tensor_model_parallel_size
        parts = fused.unflatten(-1, (groups, -1)).split([size // groups for size in sizes.values()], dim=-1)
        return {name: part.flatten(-2) for name, part in zip(sizes, parts, strict=True)}


class LoraGateUpLinear(_LoraColumnLinear):
    """gate and up: each rank holds its part of gate, then its part of up."""

    def output_sizes(self) -> dict[str, int]:
        return dict.fromkeys(("gate", "up"), self.output_size_per_partition // 2)

    def combine(self, deltas, like_SBO):
        size = self.output_size_per_partition // 2
        return torch.cat(
            [deltas[name] if name in deltas else like_SBO.new_zeros(*like_SBO.shape[:-1], size) for name in ("gate", "up")], dim=-1
        )

    def split(self, fused):
        return dict(zip(("gate", "up"), fused.chunk(2, dim=-1), strict=True))


class LoraRowLinear(RowParallelLinear):
    """A row-parallel layer with an adapter: A sharded by input features as the base weight is, B on every rank."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.lora, self.scale = lora, scale_of(lora)
        self.dropout = _Dropout(lora.dropout, sharded_input=True)
        (target,) = targets
        adapter = _Adapter(self.input_size_per_partition, self.output_size, lora, self.config)
        _mark(adapter, adapter.sharded_axes(of_A=1))
        for parameter in (adapter.lora_B, *([adapter.lora_magnitude] if lora.dora else [])):
            parameter.sequence_parallel = self.sequence_parallel
        self.adapters = torch.nn.ModuleDict({target: adapter})

    def forward(self, input_):
        output_SBO, bias = super().forward(input_)
        (adapter,) = self.adapters.values()
        A_RI, B_OR = adapter.factors
        hidden_SBR = torch.nn.functional.linear(self.dropout(input_), A_RI)
        reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
        hidden_SBR = reduce(hidden_SBR, group=self.tp_group)
        delta_SBO = torch.nn.functional.linear(hidden_SBR, B_OR) * self.scale
        if self.lora.dora:
            delta_SBO = _turned(adapter, self._row_norms(adapter), output_SBO, delta_SBO)
        return output_SBO + delta_SBO, bias

    def begin_at_base(self) -> None:
        (adapter,) = self.adapters.values()
        if self.lora.pissa:
            A_RI, B_OR = principal_factors(_gather(self.weight, 1, self.tp_group), self.lora.rank, self.scale)
            adapter.begin(A_RI.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()], B_OR)
        if self.lora.dora:
            adapter.lora_magnitude.copy_(self._row_norms(adapter))

    def _row_norms(self, adapter: _Adapter) -> torch.Tensor:
        def total(part):
            return reduce_from_tensor_model_parallel_region(part, group=self.tp_group)

        return row_norms(self.weight, *adapter.factors, self.scale, total)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return _sharded(self, {"weight": 1} | _named_axes(self.adapters, of_A=1), prefix, sharded_offsets, metadata)


def _turned(adapter: _Adapter, norms_O: torch.Tensor, plain_SBO: torch.Tensor, delta_SBO: torch.Tensor) -> torch.Tensor:
    """DoRA: what must be added to the base's output, so that the updated weight has each row of the magnitude learned for it."""
    gain_O = (adapter.lora_magnitude / norms_O).to(plain_SBO.dtype)
    return (gain_O - 1) * plain_SBO + gain_O * delta_SBO


def _mark(adapter: _Adapter, axes: dict[str, int]) -> None:
    """Tell megatron-core which parameters tensor parallelism cuts: their squares are summed over ranks in the gradient norm."""
    for name, axis in axes.items():
        parameter = getattr(adapter, name)
        parameter.tensor_model_parallel, parameter.partition_dim = True, axis


def _named_axes(adapters: torch.nn.ModuleDict, **axes: int) -> dict[str, int]:
    return {
        f"adapters.{target}.{name}": axis for target, adapter in adapters.items() for name, axis in adapter.sharded_axes(**axes).items()
    }


def _gather(part: torch.Tensor, dim: int, group) -> torch.Tensor:
    """The whole of a tensor that the ranks of a group hold in parts along an axis."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _sharded(layer, sharded_axis, prefix, sharded_offsets, metadata):
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        sharded_axis,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
