"""Weights that Transformer Engine holds in FP8. Nothing here does anything to a model without them."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.fp8_utils import is_float8tensor


@contextlib.contextmanager
def plain_weights(model: torch.nn.Module, *, trained: bool) -> Iterator[None]:
    """Within it, what is held in FP8 is plain, with values yet to be set; they are rounded to FP8 at the end.

    trained: the optimizer, which is built next, is to begin at the values as they were set.
    """
    quantised = [
        (layer, layer.weight)
        for layer in model.modules()
        if is_float8tensor(getattr(layer, "weight", None))
    ]
    for layer, weight in quantised:
        layer._parameters["weight"] = torch.nn.Parameter(
            torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        )
    yield
    for layer, weight in quantised:
        with torch.no_grad():
            weight.copy_(layer.weight)
            # What Transformer Engine keeps on the host of a weight's origin is uninitialised memory here.
            if trained:
                weight._high_precision_init_val = layer.weight.cpu()
            else:
                _forget_origin(weight)
        layer._parameters["weight"] = weight


def hold_in_fp8_alone(model: torch.nn.Module, *, keep_transposed: bool) -> None:
    """Of frozen weights keep one byte a number: no bf16 copy, and no transposed one between backward passes.

    On Hopper, whose FP8 multiplication takes one order of its operands alone, Transformer Engine keeps from a backward pass on the
    transposed weight too: as many bytes again. With scales by block both orders stay, for one is not to be had from the other
    without rounding anew.

    keep_transposed: let it, for a backward pass that does not transpose.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if is_float8tensor(weight) and hasattr(
            weight, "_transpose"
        ):  # the kind of one scale a tensor
            weight._quantizer.set_usage(columnwise=False)
            weight.update_usage(columnwise_usage=False)
            if not keep_transposed:
                layer.register_forward_pre_hook(_forgetting_transposed(weight))


def _forget_origin(weight: torch.nn.Parameter) -> None:
    for name in (
        "_high_precision_init_val",
        "get_high_precision_init_val",
        "clear_high_precision_init_val",
    ):
        weight.__dict__.pop(name, None)


def forget_scales() -> None:
    """Let go of the layers of a model before, whose history Transformer Engine would go on reducing between ranks."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def _forgetting_transposed(weight: torch.nn.Parameter):
    def before_forward(_layer, inputs):
        x, *others = inputs
        return _AfterBackward.apply(x, weight), *others

    return before_forward


class _AfterBackward(torch.autograd.Function):
    """Nothing but a place after a layer's backward pass: its input's gradient is there, its transposed weight done with."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.weight.update_usage(columnwise_usage=False)
        return gradient, None
