"""The Lion step of one parameter as a single Triton kernel. Imported on CUDA only."""

import torch
import triton
import triton.language as tl

_WARPS = 8
_BLOCK = 2048  # elements per program: two 16-byte loads per thread and tensor


def lion_step(
    p: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    kept: float,
    lr: float,
    beta1: float,
    beta2: float,
) -> None:
    """Apply `plain_step` of lion.py in one kernel, for contiguous float32 tensors of one size.

    The kernel moves 20 bytes per element where the five kernels of the plain step move 52. It
    rounds products and sums as they do, so that the results are equal.

    Args:
        p: see `plain_step`, as for the other arguments.

    Raises:
        ValueError: a tensor is not float32, not contiguous or of another size.
    """
    size = p.numel()
    for tensor in (p, grad, momentum):
        if tensor.dtype != torch.float32 or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"Lion's kernel takes contiguous float32 tensors of {size} elements, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
    _lion_kernel[(triton.cdiv(size, _BLOCK),)](
        p,
        grad,
        momentum,
        size,
        float(kept),
        float(lr),
        float(1 - beta1),
        float(1 - beta2),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # otherwise the decayed weight goes into the sum unrounded
    )


@triton.jit
def _lerp(start, end, weight):
    """Interpolate as torch does (ATen/native/Lerp.h).

    It starts from the nearer end, and rounds product and sum once.
    """
    difference = end - start
    if weight < 0.5:
        result = tl.fma(tl.full(difference.shape, weight, tl.float32), difference, start)
    else:
        result = tl.fma(tl.full(difference.shape, weight - 1.0, tl.float32), difference, end)
    return result


# A kernel specialised on the learning rate would be compiled again at each step.
@triton.jit(do_not_specialize=["kept", "lr", "weight1", "weight2"])
def _lion_kernel(
    p_pointer, grad_pointer, momentum_pointer, size, kept, lr, weight1, weight2, BLOCK: tl.constexpr
):
    # 64-bit offsets: the embedding of a large model has more than 2^31 elements.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    p = tl.load(p_pointer + offsets, mask=mask)
    grad = tl.load(grad_pointer + offsets, mask=mask)
    momentum = tl.load(momentum_pointer + offsets, mask=mask)
    direction = _lerp(momentum, grad, weight1)
    sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
    tl.store(p_pointer + offsets, p * kept - lr * sign, mask=mask)
    tl.store(momentum_pointer + offsets, _lerp(momentum, grad, weight2), mask=mask)
