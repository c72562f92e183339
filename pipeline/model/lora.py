"""LoRA on megatron-core's sharded linear layers: one A and B each for q, k, v, o, gate, up, down.

megatron fuses q, k, v into one layer and gate, up into another; the adapters stay separate, as in
peft. Each adapted layer is a subclass of megatron's layer, so that the base weights keep their
names in checkpoints. lora_te.py contains the same for Transformer Engine's layers.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, R rank of the adapter, I
and O the features in and out (this rank's part where the layer shards them).
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from retemper.pipeline.model.adapted import Factors, TorchProducts, adapted_column, adapted_row
from retemper.pipeline.model.adapter import (
    Adapter,
    Dropout,
    dora_delta,
    dora_gain,
    is_adapter,
    lora_scaling,
    mark_tensor_parallel,
    principal_factors,
    row_norms,
)
from retemper.pipeline.schema.model import LoraConfig


def freeze_base(model: torch.nn.Module) -> None:
    """Leave only adapter parameters trainable.

    The other parameters have no gradient, no gradient buffer and no optimizer state.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) and not name.endswith("_initial"))


def enable_input_require_grads(embedding: torch.nn.Module) -> None:
    """Let the embedding's output require gradients.

    Recomputed layers take part in the backward pass only if their input requires a gradient, which
    a frozen embedding's output does not by itself. Without recomputation this is not needed.
    """
    embedding.register_forward_hook(lambda _embedding, _inputs, output: output.requires_grad_())


def check_trainable_parameters(trainable: dict[str, bool], lora: LoraConfig | None) -> None:
    """Check that exactly the method's parameters are trainable.

    LoRA never becomes full training, nor the reverse.

    Args:
        trainable: Parameter name -> whether it is trainable, of layers that include every target.
        lora: The LoRA settings; None for full training.

    Raises:
        AssertionError: If other parameters are trainable, or a target has no adapter.
    """
    if lora is None:
        assert all(trainable.values()), (
            f"method=full, but frozen: {[name for name in trainable if not trainable[name]]}"
        )
        return
    training = {name for name, trains in trainable.items() if trains}
    assert all(map(is_adapter, training)), (
        "method=lora, but other parameters than adapters are trainable: "
        f"{sorted(name for name in training if not is_adapter(name))}"
    )
    missing = set(lora.targets) - {name.split(".")[-2] for name in training}
    assert not missing, f"no layer has an adapter for the targets {sorted(missing)}"


@torch.no_grad()
def init_from_base(model: torch.nn.Module) -> None:
    """Initialise the adapter parameters that depend on the base weights, once those are loaded.

    These are PiSSA's factors and DoRA's magnitudes.

    Collective: every rank must call this.
    """
    for layer in model.modules():
        if isinstance(layer, ColumnAdapters | RowAdapter):
            layer.init_from_base()


class ColumnAdapters:
    """Adapters of a column-parallel layer.

    A is replicated on every rank; B is sharded by output features, as the base weight is.
    """

    # Of megatron-core's or Transformer Engine's layer.
    config: TransformerConfig
    weight: torch.Tensor
    bias: torch.Tensor | None

    def add_adapters(
        self, lora: LoraConfig, targets: list[str], in_features: int, group, *, fused: bool
    ) -> None:
        """Add the adapters to the layer, after its construction.

        Args:
            lora: The LoRA settings.
            targets: The parts of the layer to adapt.
            in_features: The features in.
            group: The tensor-parallel group.
            fused: Whether layer and adapters are one autograd function in training (adapted.py).
        """
        self.lora = lora
        self.scale = lora_scaling(lora)
        self.adapter_group = group
        self.fused = fused
        self.factors: Factors | None = None
        self.dropout = Dropout(lora.dropout, sharded_input=self.config.sequence_parallel)
        sizes = self.output_sizes()
        self.adapters = torch.nn.ModuleDict(
            {name: Adapter(in_features, sizes[name], lora, self.config) for name in targets}
        )
        for adapter in self.adapters.values():
            # Each rank has a part of the sequence, so megatron sums these gradients over the
            # tensor-parallel group.
            adapter.lora_A.sequence_parallel = self.config.sequence_parallel
            mark_tensor_parallel(adapter, adapter.sharded_axes(of_B=0, of_magnitude=0))

    def output_sizes(self) -> dict[str, int]:
        """Return the output features on this rank of each part, adapted or not."""
        raise AssertionError("implemented by the layer class")

    def fuse(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Concatenate tensors of all parts along their output features, in the fused layer's order.

        Returns a tensor (O, ...).
        """
        raise AssertionError("implemented by the layer class")

    def views(self, fused: torch.Tensor, dim: int) -> dict[str, torch.Tensor]:
        """Return a view of each part of a tensor in the fused layer's order.

        Where a part's features are not contiguous, dimension `dim` becomes two dimensions.

        Args:
            fused: A tensor whose dimension `dim` has the layer's output features.
            dim: That dimension.
        """
        raise AssertionError("implemented by the layer class")

    def split(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts that `fuse` concatenated."""
        sizes = self.output_sizes()
        return {
            name: part.reshape(sizes[name], *fused.shape[1:])
            for name, part in self.views(fused, 0).items()
        }

    def with_adapters(self, output_SBO: torch.Tensor, x_SBI: torch.Tensor) -> torch.Tensor:
        """Return the base layer's output plus the adapters' outputs for x.

        All adapters are computed as one, with a block-diagonal B: the cost of an adapter is a
        product and a sum of the fused layer's width, and these are then done once.
        """
        A_RI, B_OR = self._joined({name: adapter() for name, adapter in self.adapters.items()})
        hidden_SBR = torch.nn.functional.linear(self.dropout(x_SBI), A_RI)
        # The gradient of hidden is a sum over the ranks, which have parts of B: R numbers per
        # token, not I.
        if self.config.sequence_parallel:
            hidden_SBR = gather_from_sequence_parallel_region(hidden_SBR, group=self.adapter_group)
        else:
            hidden_SBR = copy_to_tensor_model_parallel_region(hidden_SBR, group=self.adapter_group)
        delta_SBO = torch.nn.functional.linear(hidden_SBR * self.scale, B_OR)
        if self.lora.dora:
            plain_SBO = (
                output_SBO if self.bias is None or not self.bias.numel() else output_SBO - self.bias
            )
            delta_SBO = dora_delta(self._gains(), plain_SBO, delta_SBO)
        return output_SBO + delta_SBO

    def _joined(
        self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of all adapters together; R is the sum of their ranks.

        B is block-diagonal, with zeros for parts without an adapter.
        """
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
            name: dora_gain(adapter, self._row_norms(name))
            for name, adapter in self.adapters.items()
        }
        like = next(iter(gains.values()))
        return self.fuse(
            {
                name: gains.get(name, like.new_ones(size))
                for name, size in self.output_sizes().items()
            }
        )

    def init_from_base(self) -> None:
        """Initialise PiSSA's factors and DoRA's magnitudes from the base weight."""
        for name, adapter in self.adapters.items():
            if self.lora.pissa:
                weight_OI = _gather(self.split(self.weight)[name], 0, self.adapter_group)
                A_RI, B_OR = principal_factors(weight_OI, self.lora.rank, self.scale)
                adapter.init_factors(
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
    """The parts q, k and v of a fused layer.

    megatron interleaves them by query group: (group, [heads of q, k, v], head size).
    """

    config: TransformerConfig  # of the layer

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
    """The parts gate and up of a fused layer: each rank has its part of gate, then of up."""

    config: TransformerConfig  # of the layer

    def output_sizes(self) -> dict[str, int]:
        size = self.config.ffn_hidden_size // self.config.tensor_model_parallel_size
        return {"gate": size, "up": size}

    def fuse(self, parts):
        return torch.cat(list(parts.values()))

    def views(self, fused, dim):
        return dict(zip(("gate", "up"), fused.chunk(2, dim=dim), strict=True))


class RowAdapter:
    """The adapter of a row-parallel layer.

    A is sharded by input features, as the base weight is; B is replicated on every rank.
    """

    # Of megatron-core's or Transformer Engine's layer.
    config: TransformerConfig
    weight: torch.Tensor
    # The function and the tensor that the next input was computed with, if the backward pass shall
    # compute it again (adapted.py, recompute_product).
    input_source: tuple[Callable, torch.Tensor] | None = None

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
        """Add the adapter to the layer, after its construction.

        Args:
            lora: The LoRA settings.
            target: The name of the layer's only part.
            in_features: The features in on this rank.
            out_features: The features out.
            group: The tensor-parallel group.
            fused: Whether layer and adapter are one autograd function in training (adapted.py).
        """
        self.lora = lora
        self.scale = lora_scaling(lora)
        self.adapter_group = group
        self.fused = fused
        self.factors: Factors | None = None
        self.dropout = Dropout(lora.dropout, sharded_input=True)
        adapter = Adapter(in_features, out_features, lora, self.config)
        mark_tensor_parallel(adapter, adapter.sharded_axes(of_A=1))
        for parameter in (adapter.lora_B, *([adapter.lora_magnitude] if lora.dora else [])):
            parameter.sequence_parallel = self.config.sequence_parallel
        self.adapters = torch.nn.ModuleDict({target: adapter})

    def output_sizes(self) -> dict[str, int]:
        """Return the output features of the layer's only part."""
        return {name: adapter.lora_B.shape[0] for name, adapter in self.adapters.items()}

    def with_adapter(self, output_SBO: torch.Tensor, x_SBI: torch.Tensor) -> torch.Tensor:
        """Return the base layer's output plus the adapter's output for x."""
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
            delta_SBO = dora_delta(
                dora_gain(adapter, self._row_norms(adapter)), output_SBO, delta_SBO
            )
        return output_SBO + delta_SBO

    def init_from_base(self) -> None:
        """Initialise PiSSA's factors and DoRA's magnitudes from the base weights."""
        (adapter,) = self.adapters.values()
        if self.lora.pissa:
            A_RI, B_OR = principal_factors(
                _gather(self.weight, 1, self.adapter_group), self.lora.rank, self.scale
            )
            adapter.init_factors(
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
    """megatron-core's column-parallel layer with adapters for q, k and v."""


class LoraGateUpLinear(GateUpOutputs, _LocalColumn):
    """megatron-core's column-parallel layer with adapters for gate and up."""


class LoraRowLinear(RowAdapter, TorchProducts, RowParallelLinear):
    """megatron-core's row-parallel layer with an adapter for o or down."""

    def __init__(self, *args, lora: LoraConfig, targets: list[str], fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        (target,) = targets
        sizes = self.input_size_per_partition, self.output_size
        self.add_adapter(lora, target, *sizes, self.tp_group, fused=fused)

    def forward(self, input_):
        if self.fused and self.training:
            return adapted_row(self, input_), None
        output_SBO, bias = super().forward(input_)
        return self.with_adapter(output_SBO, input_), bias


def layers() -> tuple[type, type, type]:
    """Return the adapted layer classes for q-k-v, gate-up and row-parallel layers."""
    return LoraQkvLinear, LoraGateUpLinear, LoraRowLinear


def _named_axes(adapters: torch.nn.ModuleDict, **axes: int) -> dict[str, int]:
    return {
        f"adapters.{target}.{name}": axis
        for target, adapter in adapters.items()
        for name, axis in adapter.sharded_axes(**axes).items()
    }


def _gather(part: torch.Tensor, dim: int, group) -> torch.Tensor:
    """Return the whole tensor of which the ranks of a group have parts along dimension `dim`.

    Collective: every rank of the group must call this.
    """
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
