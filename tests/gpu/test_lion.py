"""Test Lion's step of a parameter as one Triton kernel: `pytest -m gpu`."""

import pytest
import torch

from retemper.pipeline.train import lion

pytestmark = pytest.mark.gpu

# Within one block, past its end, and in many: with 16-byte loads (multiples of 16) and without.
SIZES = (1, 31, 2049, 1_000_003, 1_000_016)
BETAS = ((0.9, 0.99), (0.95, 0.98), (0.3, 0.6))  # torch interpolates from the other end below 0.5


def lion_of(sizes: tuple[int, ...], betas: tuple[float, float], decay: float) -> lion.Lion:
    """Return Lion on the GPU, with random weights that depend on the sizes alone."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator).cuda()) for size in sizes]
    options = {"lr": 0.0, "max_lr": 1e-2, "betas": betas, "weight_decay": decay}
    return lion.Lion([{"params": weights} | options], defaults={})


def train(optimizer: lion.Lion, steps: int) -> list[torch.Tensor]:
    """Return weights and momenta after steps of a rising rate, with random gradients, some zero."""
    generator = torch.Generator().manual_seed(1)
    (group,) = optimizer.param_groups
    for step in range(1, steps + 1):
        group["lr"] = group["max_lr"] * step / steps
        for weight in group["params"]:
            gradient = torch.randn(weight.shape, generator=generator)
            gradient[torch.rand(weight.shape, generator=generator) < 0.1] = 0
            weight.grad = gradient.cuda()
        optimizer.step()
    momenta = [optimizer.state[weight]["exp_avg"] for weight in group["params"]]
    return [tensor.detach().cpu() for tensor in [*group["params"], *momenta]]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_kernel_equals_the_plain_step_bit_for_bit(monkeypatch, betas, decay):
    pytest.importorskip("triton")
    from retemper.pipeline.train import lion_triton

    assert lion._step_on_cuda() is lion_triton.lion_step
    fused = train(lion_of(SIZES, betas, decay), 5)
    monkeypatch.setattr(lion, "_step_on_cuda", lambda: lion.plain_step)
    plain = train(lion_of(SIZES, betas, decay), 5)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} differ"


def test_new_rates_compile_no_new_kernel():
    pytest.importorskip("triton")
    from retemper.pipeline.train import lion_triton

    optimizer = lion_of((4096,), (0.9, 0.99), 0.1)
    train(optimizer, 1)
    compiled = dict(lion_triton._lion_kernel.device_caches)[torch.cuda.current_device()][0]
    before = len(compiled)
    assert before
    train(optimizer, 7)
    assert len(compiled) == before


def test_more_elements_than_32_bits_count():
    pytest.importorskip("triton")
    from retemper.pipeline.train import lion_triton

    size = 2**31 + 5
    if torch.cuda.get_device_properties(0).total_memory < 3 * 4 * size * 1.1:
        pytest.skip("3 tensors of 8 GiB are needed")
    p, grad, momentum = (torch.full((size,), value, device="cuda") for value in (1.0, 2.0, 0.0))
    lion_triton.lion_step(p, grad, momentum, 0.5, 0.25, 0.5, 0.75)
    assert bool((p == 0.25).all())
    assert bool((momentum == 0.5).all())
