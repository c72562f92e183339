"""Test Lion's Triton kernel against the plain step, in Triton's interpreter without a GPU."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

# The interpreter has no fused multiply-add, so the rounding may differ here. tests/gpu compares the
# bits.
COMPARISON = """
import torch

from retemper.pipeline.train.lion import plain_step
from retemper.pipeline.train.lion_triton import lion_step

generator = torch.Generator().manual_seed(0)
for size in (1, 31, 2048, 5003):
    for beta1, beta2 in ((0.9, 0.99), (0.3, 0.6)):
        for kept in (1.0, 0.98):
            p, momentum = torch.randn(2, size, generator=generator).unbind()
            expected = p.clone(), momentum.clone()
            for lr in (1e-3, 1e-2, 0):
                grad = torch.randn(size, generator=generator)
                near_zero = expected[1].lerp(grad, 1 - beta1).abs() < 1e-6
                assert not near_zero.any(), "a sign depends on rounding: draw other numbers"
                lion_step(p, grad, momentum, kept, lr, beta1, beta2)
                plain_step(expected[0], grad, expected[1], kept, lr, beta1, beta2)
            torch.testing.assert_close(p, expected[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(momentum, expected[1], rtol=0, atol=1e-6)

p = torch.ones(64)
lion_step(p, torch.zeros(64), torch.zeros(64), 1.0, 0.1, 0.9, 0.99)
assert bool((p == 1).all()), "a direction of zero moves nothing"

transposed = torch.randn(8, 8).t()
for refused in (transposed, torch.randn(64).double(), torch.randn(63)):
    try:
        lion_step(torch.randn(64), refused, torch.randn(64), 1.0, 0.1, 0.9, 0.99)
    except ValueError as error:
        assert "contiguous float32 tensors of 64 elements" in str(error)
    else:
        raise AssertionError(f"{refused.dtype} of shape {tuple(refused.shape)} was taken")
print("compared")
"""


def test_the_triton_kernel_matches_the_plain_step():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", COMPARISON],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "compared\n", result.stderr[-3000:]
