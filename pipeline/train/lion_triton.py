"""Lion's step of one parameter as a single Triton kernel. Imported on CUDA only."""

import torch
import triton
import triton.language as tl

_WARPS = 8
_BLOCK = 2048  # elements of one program: two loads of 16 bytes a thread and tensor


def lion_step(
    p: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    kept: float,
    lr: float,
    beta1: float,
    beta2: float,
) -> None:
    """What `plain_step` of lion.py does, for contiguous float32 tensors of one size.

    It moves 20 bytes an element where five kernels of the plain step move 52, and rounds products
    and sums as those do, so that the results are equal. Raises ValueError for other tensors.
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
    """As torch has it (ATen/native/Lerp.h): from the nearer end, product and sum rounded once."""
    apart = end - start
    if weight < 0.5:
        result = tl.fma(tl.full(apart.shape, weight, tl.float32), apart, start)
    else:
        result = tl.fma(tl.full(apart.shape, weight - 1.0, tl.float32), apart, end)
    return result


# A kernel specialised on the learning rate would be compiled anew each step.
@triton.jit(do_not_specialize=["kept", "lr", "weight1", "weight2"])
def _lion_kernel(
    p_pointer, grad_pointer, momentum_pointer, size, kept, lr, weight1, weight2, BLOCK: tl.constexpr
):
    # Offsets of 64 bits: the embedding of a large model has more than 2^31 elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < size
    p = tl.load(p_pointer + at, mask=within)
    grad = tl.load(grad_pointer + at, mask=within)
    momentum = tl.load(momentum_pointer + at, mask=within)
    direction = _lerp(momentum, grad, weight1)
    sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
    tl.store(p_pointer + at, p * kept - lr * sign, mask=within)
    tl.store(momentum_pointer + at, _lerp(momentum, grad, weight2), mask=within)
