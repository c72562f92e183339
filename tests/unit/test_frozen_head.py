"""Test the piecewise loss of a frozen output layer against torch's cross entropy of all logits.

tests/multiproc/test_sharded_head.py tests it on several ranks.
"""

import pytest
import torch

from retemper.pipeline.distributed.topology import prepare_megatron

BATCH = 3
LENGTH = 37
HIDDEN = 24
PADDED = 256  # the vocabulary size with padding

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core's imports


@pytest.fixture(scope="module")
def frozen_head():
    prepare_megatron()
    from retemper.pipeline.model import frozen_head

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield frozen_head
    torch.distributed.destroy_process_group()


def layer_of(vocab_size: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return a frozen output layer of one rank.

    A hook masks the logits of its padding, as in a real model.
    """
    from retemper.pipeline.model.build import _mask_padded_logits

    torch.manual_seed(0)
    layer = torch.nn.Linear(HIDDEN, PADDED, bias=False, dtype=dtype).requires_grad_(False)
    layer.tp_group = torch.distributed.group.WORLD
    layer.sequence_parallel = False
    layer.output_size_per_partition = PADDED
    _mask_padded_logits(layer, vocab_size, 0)
    return layer


def draw_inputs(vocab_size: int, dtype: torch.dtype, scale: float = 1.0):
    """Draw hidden states (S, B, H) that require a gradient, labels and loss weights.

    Labels and weights are (B, S); some weights are 0.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (LENGTH, BATCH, HIDDEN)
    hidden_SBH = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels_BS = torch.randint(vocab_size, (BATCH, LENGTH), generator=generator)
    weights_BS = torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64)
    weights_BS *= torch.rand(BATCH, LENGTH, generator=generator) > 0.3
    return hidden_SBH.to(dtype).requires_grad_(), labels_BS, weights_BS


def piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS):
    return frozen_head.losses(
        hidden_states=hidden_SBH, output_layer=layer, output_weight=None, labels=labels_BS
    )


def reference_losses(layer, vocab_size, hidden_SBH, labels_BS):
    """Return the losses from all logits of the unpadded vocabulary, in float64."""
    logits_NV = hidden_SBH.flatten(0, 1) @ layer.weight[:vocab_size].t()
    labels_N = labels_BS.t().flatten()
    losses_N = torch.nn.functional.cross_entropy(logits_NV.double(), labels_N, reduction="none")
    return losses_N.view(hidden_SBH.shape[:2]).t()


@pytest.mark.parametrize("vocab_size", [PADDED, 131])
@pytest.mark.parametrize("piece", [1024, LENGTH * BATCH, 10, 1])  # of 111 tokens
def test_losses_and_gradients_match_those_of_all_logits(
    frozen_head, monkeypatch, vocab_size, piece
):
    monkeypatch.setattr(frozen_head, "PIECE", piece)
    layer = layer_of(vocab_size, torch.float64)
    hidden_SBH, labels_BS, weights_BS = draw_inputs(vocab_size, torch.float64)
    expected_BS = reference_losses(layer, vocab_size, hidden_SBH, labels_BS)
    got_BS = piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS)
    torch.testing.assert_close(got_BS, expected_BS, rtol=1e-12, atol=1e-13)
    (expected_SBH,) = torch.autograd.grad((expected_BS * weights_BS).sum(), hidden_SBH)
    (got_SBH,) = torch.autograd.grad((got_BS * weights_BS).sum(), hidden_SBH)
    torch.testing.assert_close(got_SBH, expected_SBH, rtol=1e-12, atol=1e-13)
    assert (got_SBH.transpose(0, 1)[weights_BS == 0] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # improbable labels, or nearly certain ones
def test_low_precision_is_accumulated_in_float32(frozen_head, monkeypatch, dtype, tolerance, scale):
    monkeypatch.setattr(frozen_head, "PIECE", 16)
    layer = layer_of(131, dtype)
    hidden_SBH, labels_BS, weights_BS = draw_inputs(131, dtype, scale)
    if scale > 1:  # the most probable token, so that the gradient is 1 minus nearly 1
        labels_BS = (hidden_SBH @ layer.weight[:131].t()).argmax(2).t()
    expected_BS = reference_losses(layer, 131, hidden_SBH, labels_BS)
    got_BS = piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS)
    assert got_BS.dtype == torch.float32
    assert (got_BS - expected_BS).norm() <= tolerance * expected_BS.norm()
    (expected_SBH,) = torch.autograd.grad((expected_BS * weights_BS).sum(), hidden_SBH)
    (got_SBH,) = torch.autograd.grad((got_BS * weights_BS).sum(), hidden_SBH)
    assert got_SBH.dtype == dtype
    assert (got_SBH - expected_SBH).norm() <= 2 * tolerance * expected_SBH.norm()


def test_no_gradient_is_computed_under_no_grad(frozen_head):
    from torch.utils.flop_counter import FlopCounterMode

    layer = layer_of(131, torch.float32)
    hidden_SBH, labels_BS, _ = draw_inputs(131, torch.float32)
    product = 2 * LENGTH * BATCH * HIDDEN * PADDED
    with FlopCounterMode(display=False) as trained:
        training_losses = piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS)
    with FlopCounterMode(display=False) as scored, torch.no_grad():
        scoring_losses = piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS)
    assert (trained.get_total_flops(), scored.get_total_flops()) == (2 * product, product)
    assert scoring_losses.equal(training_losses)
    assert training_losses.requires_grad
    assert not scoring_losses.requires_grad


def test_the_loss_reads_no_tensor_value_on_the_host(frozen_head, monkeypatch):
    """Check that a CUDA graph can contain the loss.

    Fake tensors have shapes but no values, so code that reads a value fails.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(frozen_head, "PIECE", 16)
    hidden_SBH, labels_BS, weights_BS = draw_inputs(131, torch.bfloat16)
    layer = layer_of(131, torch.bfloat16)
    with FakeTensorMode() as mode:
        layer.weight = torch.nn.Parameter(mode.from_tensor(layer.weight), requires_grad=False)
        hidden_SBH = mode.from_tensor(hidden_SBH)
        labels_BS = mode.from_tensor(labels_BS)
        weights_BS = mode.from_tensor(weights_BS)
        (piecewise_losses(frozen_head, layer, hidden_SBH, labels_BS) * weights_BS).sum().backward()
    assert hidden_SBH.grad.shape == (LENGTH, BATCH, HIDDEN)
