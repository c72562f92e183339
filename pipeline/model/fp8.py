"""FP8 storage of weights by Transformer Engine. No effect on models without FP8 weights."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.fp8_utils import is_float8tensor


@contextlib.contextmanager
def dequantized_weights(model: torch.nn.Module, *, trained: bool) -> Iterator[None]:
    """Replace FP8 weights by plain ones with undefined values; quantize them when the context ends.

    Args:
        model: The model whose weights are to be set within the context.
        trained: Whether the optimizer, which is built next, starts from the exact values set within
            the context.
    """
    quantized_weights = [
        (layer, layer.weight)
        for layer in model.modules()
        if is_float8tensor(getattr(layer, "weight", None))
    ]
    for layer, weight in quantized_weights:
        layer._parameters["weight"] = torch.nn.Parameter(
            torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        )
    yield
    for layer, weight in quantized_weights:
        with torch.no_grad():
            weight.copy_(layer.weight)
            # The initial value that Transformer Engine stored on the host is uninitialised memory.
            if trained:
                weight._high_precision_init_val = layer.weight.cpu()
            else:
                _drop_high_precision_init(weight)
        layer._parameters["weight"] = weight


def drop_transposed_copies(model: torch.nn.Module, *, keep_transposed: bool) -> None:
    """Keep frozen weights in one order of their elements, one byte per element.

    This drops the transposed copy, now and after each backward pass. On Hopper, whose FP8
    multiplication accepts only one order of its operands, Transformer Engine otherwise keeps the
    transposed weight from the first backward pass on: as many bytes again. With block-wise scales
    both orders are kept, because one cannot be derived from the other without rounding again.

    Args:
        model: The model, before or after its weights are set.
        keep_transposed: Keep the transposed copy from the first backward pass on, which saves
            the transposition in each of them.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        # Only tensors with one scale have this attribute.
        if weight is not None and is_float8tensor(weight) and hasattr(weight, "_transpose"):
            weight._quantizer.set_usage(columnwise=False)
            weight.update_usage(columnwise_usage=False)
            if not keep_transposed:
                layer.register_forward_pre_hook(_free_transpose_hook(weight))


def _drop_high_precision_init(weight: torch.nn.Parameter) -> None:
    """Remove the high-precision initial value that Transformer Engine stores with a weight."""
    for name in (
        "_high_precision_init_val",
        "get_high_precision_init_val",
        "clear_high_precision_init_val",
    ):
        weight.__dict__.pop(name, None)


def reset_fp8_state() -> None:
    """Reset Transformer Engine's FP8 state, the amax history of a previous model's layers.

    Otherwise Transformer Engine would continue to reduce that history between ranks.
    """
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def update_gradient_scales() -> None:
    """Update delayed FP8 scales of gradients from the maxima since the last update.

    Transformer Engine does this in the backward pass of the first of its own layers. Adapted layers
    are functions of model/adapted.py, and only attention has such scales beside them.

    Collective: every rank must call this.
    """
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def _free_transpose_hook(weight: torch.nn.Parameter):
    """Return a forward pre-hook that frees the transposed weight after the backward pass."""

    def before_forward(_layer, inputs):
        x, *others = inputs
        return _FreeTransposeAfterBackward.apply(x, weight), *others

    return before_forward


class _FreeTransposeAfterBackward(torch.autograd.Function):
    """An identity whose backward pass frees the transposed weight of the layer after it.

    At that time the gradient of the layer's input has been computed.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.weight.update_usage(columnwise_usage=False)
        return gradient, None
