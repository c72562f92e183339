"""A frozen linear layer and its adapters as one autograd function.

Written as separate operations (lora.py), an adapted layer launches about three times as many
kernels as it has matrix products: sums of whole outputs, scalings, copies of gradients. Here the
adapters' product is written first and the frozen weight's product is accumulated onto it. The
gradient of the input is computed in the same way. Gradients of A and B are added to the buffers
that megatron-core reduces (`main_grad`) without a copy. Of the layer's input only what A's gradient
needs is stored.

Shapes: T tokens (sequence x batch) that a rank's matrices see, R the ranks of a layer's adapters
together, I and O the features in and out on this rank. Under sequence parallelism a column-parallel
layer's input and a row-parallel layer's output have this rank's share of the tokens.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from retemper.pipeline.model.adapter import Adapter

# From this rank on separate products with each part's B are cheaper than one block-diagonal
# product, which multiplies zeros.
_APART_FROM_RANK = 64


class TorchProducts:
    """The products with a frozen layer's weight, computed by torch.

    A layer with other kernels overrides them (lora_te.py).
    """

    weight: torch.Tensor  # of the layer class

    def add_output(self, output_TO: torch.Tensor, x_TI: torch.Tensor) -> object:
        """Add the frozen weight's output for x.

        Returns the context that add_input_gradient receives; None here.
        """
        output_TO.addmm_(x_TI, self.weight.t())
        return None

    def add_input_gradient(
        self, gradient_TI: torch.Tensor, gradient_TO: torch.Tensor, _context
    ) -> None:
        """Add the gradient of the input through the frozen weight."""
        gradient_TI.addmm_(gradient_TO, self.weight)

    def add_weight_gradient(
        self, main_grad: torch.Tensor, left_TX: torch.Tensor, right_TY: torch.Tensor
    ) -> None:
        """Add left^T right, a factor's gradient, to the float32 gradient buffer (X, Y)."""
        if main_grad.dtype == left_TX.dtype:
            main_grad.addmm_(left_TX.t(), right_TY)
        else:
            main_grad.add_(left_TX.t() @ right_TY)


class Factors:
    """The factors of a layer's adapters, in the form that the layer's function multiplies by.

    A single adapter's A and B are used directly. Several adapters' A are concatenated, so that the
    input is read once, and their B are blocks of one matrix as wide as the layer, unless their rank
    is large: then each part of the output has a separate product. The concatenated factors are
    copies: `refresh` updates them, and `hand_out` adds their gradients to those of the parameters.
    """

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer
        self.adapters: dict[str, Adapter] = dict(layer.adapters)
        self.joined = len(layer.output_sizes()) > 1
        ranks = [adapter.lora_A.shape[0] for adapter in self.adapters.values()]
        self.in_blocks = self.joined and max(ranks) < _APART_FROM_RANK
        ends = torch.tensor(ranks).cumsum(0).tolist()
        self.rows = {
            name: slice(end - rank, end)
            for name, rank, end in zip(self.adapters, ranks, ends, strict=True)
        }
        first = next(iter(self.adapters.values()))
        if not self.joined:
            self.A_RI = first.lora_A
            return
        self.A_RI = first.lora_A.new_empty(sum(ranks), first.lora_A.shape[1])
        self.grad_A_RI = self.A_RI.new_zeros(self.A_RI.shape, dtype=torch.float32)
        if self.in_blocks:
            features = sum(layer.output_sizes().values())
            self.B_OR = self.A_RI.new_zeros(features, sum(ranks))
            self.grad_B_OR = self.B_OR.new_zeros(self.B_OR.shape, dtype=torch.float32)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters into the concatenated factors.

        An optimizer or a checkpoint may have changed them.
        """
        if not self.joined:
            return
        for name, adapter in self.adapters.items():
            self.A_RI[self.rows[name]].copy_(adapter.lora_A)
        if self.in_blocks:
            for adapter, block in self._blocks(self.B_OR):
                block.copy_(adapter.lora_B.view(block.shape))

    @torch.no_grad()
    def hand_out(self) -> None:
        """Add the concatenated factors' gradients to those of the parameters, then zero them."""
        if not self.joined:
            return
        for name, adapter in self.adapters.items():
            adapter.lora_A.main_grad.add_(self.grad_A_RI[self.rows[name]])
        if self.in_blocks:
            for adapter, block in self._blocks(self.grad_B_OR):
                adapter.lora_B.main_grad.add_(block.reshape(adapter.lora_B.shape))
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Zero the gradients of the concatenated factors."""
        if self.joined:
            self.grad_A_RI.zero_()
        if self.in_blocks:
            self.grad_B_OR.zero_()

    def _blocks(self, B_OR: torch.Tensor) -> Iterator[tuple[Adapter, torch.Tensor]]:
        views = self.layer.views(B_OR, 0)
        for name, adapter in self.adapters.items():
            yield adapter, views[name][..., self.rows[name]]

    def output(self, hidden_TR: torch.Tensor) -> torch.Tensor:
        """Return hidden · B^T over the whole width of the layer, (T, O).

        It is zero for parts without an adapter.
        """
        if not self.joined:
            (adapter,) = self.adapters.values()
            return hidden_TR @ adapter.lora_B.t()
        if self.in_blocks:
            return hidden_TR @ self.B_OR.t()
        output_TO = hidden_TR.new_empty(len(hidden_TR), sum(self.layer.output_sizes().values()))
        for name, part in self.layer.views(output_TO, 1).items():
            if name not in self.adapters:
                part.zero_()
            elif part.ndim == 2:
                torch.mm(hidden_TR[:, self.rows[name]], self.adapters[name].lora_B.t(), out=part)
            else:
                product = hidden_TR[:, self.rows[name]] @ self.adapters[name].lora_B.t()
                part.copy_(product.view(part.shape))
        return output_TO

    def hidden_gradient(self, gradient_TO: torch.Tensor, scale: float) -> torch.Tensor:
        """Return scale · gradient · B, (T, R).

        For a column-parallel layer this is this rank's contribution to a sum.
        """
        if not self.joined:
            (adapter,) = self.adapters.values()
            return _scaled_product(gradient_TO, adapter.lora_B, scale)
        if self.in_blocks:
            return _scaled_product(gradient_TO, self.B_OR, scale)
        parts = self.layer.views(gradient_TO, 1)
        return torch.cat(
            [
                _scaled_product(parts[name].flatten(1), adapter.lora_B, scale)
                for name, adapter in self.adapters.items()
            ],
            dim=1,
        )

    def add_B_gradient(self, gradient_TO: torch.Tensor, hidden_TR: torch.Tensor) -> None:
        """Add gradient^T · hidden to the gradient of B; hidden must already be scaled."""
        add = self.layer.add_weight_gradient
        if not self.joined:
            (adapter,) = self.adapters.values()
            add(adapter.lora_B.main_grad, gradient_TO, hidden_TR)
        elif self.in_blocks:
            add(self.grad_B_OR, gradient_TO, hidden_TR)
        else:
            parts = self.layer.views(gradient_TO, 1)
            for name, adapter in self.adapters.items():
                part_TO = parts[name].flatten(1).contiguous()
                hidden = hidden_TR[:, self.rows[name]].contiguous()
                add(adapter.lora_B.main_grad, part_TO, hidden)

    def add_A_gradient(self, hidden_gradient_TR: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add hidden_gradient^T · x to the gradient of A."""
        main_grad = self.grad_A_RI if self.joined else self.A_RI.main_grad
        self.layer.add_weight_gradient(main_grad, hidden_gradient_TR, x_TI)


def join_factors(stages: list[torch.nn.Module]) -> None:
    """Update the concatenated factors. Must be called before each pass over micro-batches."""
    for layer in _adapted_layers(stages):
        if layer.factors is None:
            layer.factors = Factors(layer)
        layer.factors.refresh()


def hand_out_gradients(stages: list[torch.nn.Module]) -> None:
    """Add the gradients of all micro-batches to those of each adapter.

    Must be called before gradients are reduced over ranks.
    """
    for layer in _adapted_layers(stages):
        layer.factors.hand_out()


def forget_gradients(stages: list[torch.nn.Module]) -> None:
    """Zero the concatenated factors' gradients, for passes that do not count.

    The gradients in megatron-core's buffers are not affected.
    """
    for layer in _adapted_layers(stages):
        layer.factors.forget_gradients()


def _adapted_layers(stages: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for stage in stages:
        yield from (layer for layer in stage.modules() if getattr(layer, "fused", False))


def adapted_column(layer: torch.nn.Module, x_SBI: torch.Tensor) -> torch.Tensor:
    """Return a column-parallel layer's output, (S, B, O), including adapters and bias."""
    return _AdaptedColumn.apply(x_SBI, _anchor(layer), layer)


def adapted_row(layer: torch.nn.Module, x_SBI: torch.Tensor) -> torch.Tensor:
    """Return a row-parallel layer's output, (S, B, O), including its adapter."""
    source, layer.input_source = layer.input_source, None
    return _AdaptedRow.apply(x_SBI, _anchor(layer), layer, source)


def recompute_product(mlp: torch.nn.Module) -> None:
    """Let an adapted layer down recompute its input, the product of gate and up.

    SwiGLU stores gate and up for its own backward pass, so that the product need not be stored.

    Args:
        mlp: A feed-forward layer whose SwiGLU is a module, activation_func.
    """
    activation, down = mlp.activation_func, mlp.linear_fc2

    def remember(_activation, inputs, _product_SBF):
        if down.training:
            down.input_source = activation.forward, inputs[0]

    activation.register_forward_hook(remember)


def _anchor(layer: torch.nn.Module) -> torch.nn.Parameter:
    """Return a parameter that requires a gradient, so that autograd calls the backward pass.

    The first layer's input may not require one, and the factors' gradients bypass autograd.
    """
    return next(iter(layer.adapters.values())).lora_A


class _AdaptedColumn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SBI, _anchor, layer):
        factors, group = layer.factors, layer.adapter_group
        ctx.split = layer.config.sequence_parallel
        x_TI = x_SBI.flatten(0, 1)
        hidden_TR = _scaled_product(x_TI, factors.A_RI.t(), layer.scale)
        whole_TI = x_TI
        if ctx.split:
            hidden_TR = gather_from_sequence_parallel_region(hidden_TR, group=group)
            whole_TI = gather_from_sequence_parallel_region(x_TI, group=group)
        output_TO = factors.output(hidden_TR)
        ctx.base = layer.add_output(output_TO, whole_TI)
        if layer.bias is not None and layer.bias.numel():
            output_TO += layer.bias
        ctx.save_for_backward(x_TI, hidden_TR)
        ctx.layer = layer
        ctx.batch = x_SBI.shape[1]
        return output_TO.unflatten(0, (-1, ctx.batch))

    @staticmethod
    def backward(ctx, gradient_SBO):
        x_TI, hidden_TR = ctx.saved_tensors
        layer = ctx.layer
        factors = ctx.layer.factors
        group = ctx.layer.adapter_group
        gradient_TO = gradient_SBO.flatten(0, 1).contiguous()
        hidden_gradient_TR = factors.hidden_gradient(gradient_TO, layer.scale)
        factors.add_B_gradient(gradient_TO, hidden_TR)
        # Both gradients are sums over ranks, each of which has a part of the output features.
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if ctx.split
            else reduce_from_tensor_model_parallel_region
        )
        gradient_TI = _input_gradient(ctx, hidden_gradient_TR, gradient_TO)
        if gradient_TI is not None:
            gradient_TI = reduce(gradient_TI, group=group).unflatten(0, (-1, ctx.batch))
        factors.add_A_gradient(reduce(hidden_gradient_TR, group=group), x_TI)
        return gradient_TI, None, None


class _AdaptedRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_SBI,
        _anchor,
        layer,
        source: tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor] | None,
    ):
        factors, group = layer.factors, layer.adapter_group
        ctx.split = layer.config.sequence_parallel
        x_TI = x_SBI.flatten(0, 1)
        hidden_TR = _scaled_product(x_TI, factors.A_RI.t(), layer.scale)
        # B is the same on every rank, so the sum of the products over ranks equals the product of B
        # with the sum of hidden over ranks.
        output_TO = factors.output(hidden_TR)
        ctx.base = layer.add_output(output_TO, x_TI)
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if ctx.split
            else reduce_from_tensor_model_parallel_region
        )
        output_TO = reduce(output_TO, group=group)
        ctx.compute_input, stored = source or (None, x_TI)
        ctx.save_for_backward(stored, reduce(hidden_TR, group=group))
        ctx.layer = layer
        ctx.batch = x_SBI.shape[1]
        return output_TO.unflatten(0, (-1, ctx.batch))

    @staticmethod
    def backward(ctx, gradient_SBO):
        x_TI, hidden_TR = ctx.saved_tensors
        if ctx.compute_input:
            x_TI = ctx.compute_input(x_TI).flatten(0, 1)
        layer = ctx.layer
        factors = ctx.layer.factors
        gradient_TO = gradient_SBO.flatten(0, 1).contiguous()
        factors.add_B_gradient(gradient_TO, hidden_TR)
        if ctx.split:
            gradient_TO = gather_from_sequence_parallel_region(
                gradient_TO, group=layer.adapter_group
            )
        hidden_gradient_TR = factors.hidden_gradient(gradient_TO, layer.scale)
        factors.add_A_gradient(hidden_gradient_TR, x_TI)
        del x_TI
        gradient_TI = _input_gradient(ctx, hidden_gradient_TR, gradient_TO)
        return (
            None if gradient_TI is None else gradient_TI.unflatten(0, (-1, ctx.batch)),
            None,
            None,
            None,
        )


def _input_gradient(
    ctx, hidden_gradient_TR: torch.Tensor, gradient_TO: torch.Tensor
) -> torch.Tensor | None:
    """Return the gradient of a layer's input, (T, I), through adapters and frozen weight.

    It is None if nothing before the layer is trainable.
    """
    if not ctx.needs_input_grad[0]:
        return None
    gradient_TI = hidden_gradient_TR @ ctx.layer.factors.A_RI
    ctx.layer.add_input_gradient(gradient_TI, gradient_TO, ctx.base)
    return gradient_TI


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale · left · right, computed in one kernel.

    With beta = 0 the contents of the output are not read.
    """
    output = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(output, left, right, beta=0, alpha=scale, out=output)
