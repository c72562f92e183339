"""Canonical LoRA on megatron-core's sharded linear layers: one A and one B each for q, k, v, o, gate, up and down.

megatron fuses q, k, v into one layer and gate, up into another; the adapters stay separate, as peft has them.
Each adapted layer is a subclass of megatron's own, so the base weights keep their names in checkpoints; lora_te.py has
Transformer Engine's.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, R rank of the adapter, I and O the
features in and out (this rank's part where the layer shards them).
"""

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from retemper.pipeline.model.adapted import TorchProducts, adapted_column, adapted_row
from retemper.pipeline.model.adapter import (
    Adapter,
    Dropout,
    gains_of,
    is_adapter,
    mark,
    principal_factors,
    row_norms,
    scale_of,
    turned,
)
from retemper.pipeline.schema.model import LoraConfig


def freeze_base(model: torch.nn.Module) -> None:
    """Leave only adapter parameters trainable: the rest gets no gradient, no buffer and no optimizer state."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) and not name.endswith("_initial"))


def open_to_gradients(embedding: torch.nn.Module) -> None:
    """Let what is recomputed take part in the backward pass: it does where its input asks for a gradient, and a frozen embedding's
    output does not by itself. Without recomputation nothing is asked of the first layer's input."""
    embedding.register_forward_hook(lambda _embedding, _inputs, output: output.requires_grad_())


def check_what_trains(trainable: dict[str, bool], lora: LoraConfig | None) -> None:
    """Refuse a model of which something else trains than its method says: LoRA never becomes full training, nor the reverse.

    trainable: parameter -> whether it trains, of layers that every target stands on.
    """
    if lora is None:
        assert all(trainable.values()), (
            f"full training, but frozen: {[name for name in trainable if not trainable[name]]}"
        )
        return
    training = {name for name, trains in trainable.items() if trains}
    assert all(map(is_adapter, training)), (
        f"LoRA, but not of adapters alone: {sorted(name for name in training if not is_adapter(name))}"
    )
    missing = set(lora.targets) - {name.split(".")[-2] for name in training}
    assert not missing, f"the targets {sorted(missing)} stand on no layer"


@torch.no_grad()
def begin_at_base(model: torch.nn.Module) -> None:
    """Set what of the adapters begins as a function of the base's weights, once those are loaded."""
    for layer in model.modules():
        if isinstance(layer, ColumnAdapters | RowAdapter):
            layer.begin_at_base()


class ColumnAdapters:
    """Adapters of a column-parallel layer: A on every rank, B sharded by output features as the base weight is."""

    def add_adapters(
        self, lora: LoraConfig, targets: list[str], in_features: int, group, *, fused: bool
    ) -> None:
        """Give the layer its adapters, once it is built.

        group: the tensor-parallel one. fused: layer and adapters are one function in training (adapted.py).
        """
        self.lora = lora
        self.scale = scale_of(lora)
        self.adapter_group = group
        self.fused = fused
        self.factors = None
        self.dropout = Dropout(lora.dropout, sharded_input=self.config.sequence_parallel)
        sizes = self.output_sizes()
        self.adapters = torch.nn.ModuleDict(
            {name: Adapter(in_features, sizes[name], lora, self.config) for name in targets}
        )
        for adapter in self.adapters.values():
            # Each rank sees its part of the sequence: megatron sums these gradients over the tensor-parallel group.
            adapter.lora_A.sequence_parallel = self.config.sequence_parallel
            mark(adapter, adapter.sharded_axes(of_B=0, of_magnitude=0))

    def output_sizes(self) -> dict[str, int]:
        """Output features on this rank of each part of the layer, adapted or not."""
        raise AssertionError("set by the layer")

    def fuse(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """(O, ...) in the fused layer's order, of what each part of it has along its output features."""
        raise AssertionError("set by the layer")

    def views(self, fused: torch.Tensor, dim: int) -> dict[str, torch.Tensor]:
        """Each part's view of a tensor whose dimension `dim` has the output features in the fused layer's order.

        Where a part's features do not stand together that dimension becomes two.
        """
        raise AssertionError("set by the layer")

    def split(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """What fuse put together."""
        sizes = self.output_sizes()
        return {
            name: part.reshape(sizes[name], *fused.shape[1:])
            for name, part in self.views(fused, 0).items()
        }

    def with_adapters(self, output_SBO: torch.Tensor, x_SBI: torch.Tensor) -> torch.Tensor:
        """The base layer's output for x, and the adapters' on top: one A and one B of all of them, whose ranks do not touch, for a product
        and a sum of the fused layer's width are what an adapter costs."""
        A_RI, B_OR = self._joined({name: adapter() for name, adapter in self.adapters.items()})
        hidden_SBR = torch.nn.functional.linear(self.dropout(x_SBI), A_RI)
        # The gradient of hidden is a sum over the ranks that hold a part of B: R numbers a token, not I.
        if self.config.sequence_parallel:
            hidden_SBR = gather_from_sequence_parallel_region(hidden_SBR, group=self.adapter_group)
        else:
            hidden_SBR = copy_to_tensor_model_parallel_region(hidden_SBR, group=self.adapter_group)
        delta_SBO = torch.nn.functional.linear(hidden_SBR * self.scale, B_OR)
        if self.lora.dora:
            plain_SBO = (
                output_SBO if self.bias is None or not self.bias.numel() else output_SBO - self.bias
            )
            delta_SBO = turned(self._gains(), plain_SBO, delta_SBO)
        return output_SBO + delta_SBO

    def _joined(
        self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of all adapters, R their ranks' sum: B in blocks, of a part without an adapter zero."""
        A_RI = torch.cat([A_RI for A_RI, _B in factors.values()])
        sizes = self.output_sizes()
        blocks = torch.block_diag(
            *(
                factors[name][1] if name in factors else A_RI.new_zeros(size, 0)
                for name, size in sizes.items()
            )
        )
        return A_RI, self.fuse(dict(zip(sizes, blocks.split(list(sizes.values())), strict=True)))

    def _gains(self) -> torch.Tensor:
        gains = {
            name: gains_of(adapter, self._row_norms(name))
            for name, adapter in self.adapters.items()
        }
        like = next(iter(gains.values()))
        return self.fuse(
            {
                name: gains.get(name, like.new_ones(size))
                for name, size in self.output_sizes().items()
            }
        )

    def begin_at_base(self) -> None:
        for name, adapter in self.adapters.items():
            if self.lora.pissa:
                weight_OI = _gather(self.split(self.weight)[name], 0, self.adapter_group)
                A_RI, B_OR = principal_factors(weight_OI, self.lora.rank, self.scale)
                adapter.begin(
                    A_RI, B_OR.chunk(self.adapter_group.size())[self.adapter_group.rank()]
                )
            if self.lora.dora:
                adapter.lora_magnitude.copy_(self._row_norms(name))

    def _row_norms(self, name: str) -> torch.Tensor:
        return row_norms(self.split(self.weight)[name], *self.adapters[name](), self.scale)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        axes = {"of_B": 0, "of_magnitude": 0}
        return _sharded(
            self,
            {"weight": 0, "bias": 0} | _named_axes(self.adapters, **axes),
            prefix,
            sharded_offsets,
            metadata,
        )


class QkvOutputs:
    """q, k, v: megatron interleaves them by query group, (group, [heads of q, k, v], head size)."""

    def output_sizes(self) -> dict[str, int]:
        tensor_parallel_size = self.config.tensor_model_parallel_size
        kv_size = self.config.kv_channels * self.config.num_query_groups // tensor_parallel_size
        return {
            "q": self.config.kv_channels * self.config.num_attention_heads // tensor_parallel_size,
            "k": kv_size,
            "v": kv_size,
        }

    def fuse(self, parts):
        groups = self.config.num_query_groups // self.config.tensor_model_parallel_size
        return torch.cat(
            [part.unflatten(0, (groups, -1)) for part in parts.values()], dim=1
        ).flatten(0, 1)

    def views(self, fused, dim):
        sizes = self.output_sizes()
        groups = self.config.num_query_groups // self.config.tensor_model_parallel_size
        parts = fused.unflatten(dim, (groups, -1)).split(
            [size // groups for size in sizes.values()], dim=dim + 1
        )
        return dict(zip(sizes, parts, strict=True))


class GateUpOutputs:
    """gate and up: each rank holds its part of gate, then its part of up."""

    def output_sizes(self) -> dict[str, int]:
        return dict.fromkeys(
            ("gate", "up"), self.config.ffn_hidden_size // self.config.tensor_model_parallel_size
        )

    def fuse(self, parts):
        return torch.cat(list(parts.values()))

    def views(self, fused, dim):
        return dict(zip(("gate", "up"), fused.chunk(2, dim=dim), strict=True))


class RowAdapter:
    """The adapter of a row-parallel layer: A sharded by input features as the base weight is, B on every rank."""

    def add_adapter(
        self,
        lora: LoraConfig,
        target: str,
        in_features: int,
        out_features: int,
        group,
        *,
        fused: bool,
    ) -> None:
        """Give the layer its adapter, once it is built.

        in_features: of this rank. group: the tensor-parallel one. fused: layer and adapter are one function in training
        (adapted.py).
        """
        self.lora = lora
        self.scale = scale_of(lora)
        self.adapter_group = group
        self.fused = fused
        self.factors = None
        self.dropout = Dropout(lora.dropout, sharded_input=True)
        adapter = Adapter(in_features, out_features, lora, self.config)
        mark(adapter, adapter.sharded_axes(of_A=1))
        for parameter in (adapter.lora_B, *([adapter.lora_magnitude] if lora.dora else [])):
            parameter.sequence_parallel = self.config.sequence_parallel
        self.adapters = torch.nn.ModuleDict({target: adapter})

    def output_sizes(self) -> dict[str, int]:
        """Output features of the one part that the layer has."""
        return {name: adapter.lora_B.shape[0] for name, adapter in self.adapters.items()}

    def with_adapter(self, output_SBO: torch.Tensor, x_SBI: torch.Tensor) -> torch.Tensor:
        """The base layer's output for x, and the adapter's on top."""
        (adapter,) = self.adapters.values()
        A_RI, B_OR = adapter()
        hidden_SBR = torch.nn.functional.linear(self.dropout(x_SBI), A_RI)
        split = self.config.sequence_parallel
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if split
            else reduce_from_tensor_model_parallel_region
        )
        delta_SBO = torch.nn.functional.linear(
            reduce(hidden_SBR, group=self.adapter_group) * self.scale, B_OR
        )
        if self.lora.dora:
            delta_SBO = turned(gains_of(adapter, self._row_norms(adapter)), output_SBO, delta_SBO)
        return output_SBO + delta_SBO

    def begin_at_base(self) -> None:
        (adapter,) = self.adapters.values()
        if self.lora.pissa:
            A_RI, B_OR = principal_factors(
                _gather(self.weight, 1, self.adapter_group), self.lora.rank, self.scale
            )
            adapter.begin(
                A_RI.chunk(self.adapter_group.size(), dim=1)[self.adapter_group.rank()], B_OR
            )
        if self.lora.dora:
            adapter.lora_magnitude.copy_(self._row_norms(adapter))

    def _row_norms(self, adapter: Adapter) -> torch.Tensor:
        def total(part):
            return reduce_from_tensor_model_parallel_region(part, group=self.adapter_group)

        return row_norms(self.weight, *adapter(), self.scale, total)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return _sharded(
            self,
            {"weight": 1} | _named_axes(self.adapters, of_A=1),
            prefix,
            sharded_offsets,
            metadata,
        )


class _LocalColumn(ColumnAdapters, TorchProducts, ColumnParallelLinear):
    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_adapters(lora, targets, self.input_size, self.tp_group, fused=fused)

    def forward(self, input_, weight=None, runtime_gather_output=None):
        if self.fused and self.training:
            return adapted_column(self, input_), None
        output_SBO, bias = super().forward(input_, weight, runtime_gather_output)
        return self.with_adapters(output_SBO, input_), bias


class LoraQkvLinear(QkvOutputs, _LocalColumn):
    """q, k and v of megatron-core's own layers."""


class LoraGateUpLinear(GateUpOutputs, _LocalColumn):
    """gate and up of megatron-core's own layers."""


class LoraRowLinear(RowAdapter, TorchProducts, RowParallelLinear):
    """o, or down, of megatron-core's own layers."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        sizes = self.input_size_per_partition, self.output_size
        self.add_adapter(lora, *targets, *sizes, self.tp_group, fused=fused)

    def forward(self, input_):
        if self.fused and self.training:
            return adapted_row(self, input_), None
        output_SBO, bias = super().forward(input_)
        return self.with_adapter(output_SBO, input_), bias


def _named_axes(adapters: torch.nn.ModuleDict, **axes: int) -> dict[str, int]:
    return {
        f"adapters.{target}.{name}": axis
        for target, adapter in adapters.items()
        for name, axis in adapter.sharded_axes(**axes).items()
    }


def _gather(part: torch.Tensor, dim: int, group) -> torch.Tensor:
    """The whole of a tensor that the ranks of a group hold in parts along an axis."""
    parts = [
        torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _sharded(layer, sharded_axis, prefix, sharded_offsets, metadata):
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        sharded_axis,
        sharded_offsets,
        tp_group=layer.adapter_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
