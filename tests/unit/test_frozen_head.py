"""Test the loss of a frozen output layer by pieces, beside torch's cross entropy of whole logits.

Real ranks: multiproc/test_frozen_head.py.
"""

import pytest
import torch

from retemper.pipeline.distributed.topology import prepare_megatron

BATCH, LENGTH, HIDDEN = 3, 37, 24
PADDED = 256

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

    A hook masks its padded rows, as in a built model.
    """
    from retemper.pipeline.model.build import _mask_padded_logits

    torch.manual_seed(0)
    layer = torch.nn.Linear(HIDDEN, PADDED, bias=False, dtype=dtype).requires_grad_(False)
    layer.tp_group = torch.distributed.group.WORLD
    layer.sequence_parallel = False
    layer.output_size_per_partition = PADDED
    _mask_padded_logits(layer, vocab_size, 0)
    return layer


def drawn(vocab_size: int, dtype: torch.dtype, scale: float = 1.0):
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


def by_pieces(frozen_head, layer, hidden_SBH, labels_BS):
    return frozen_head.losses(
        hidden_states=hidden_SBH, output_layer=layer, output_weight=None, labels=labels_BS
    )


def whole(layer, vocab_size, hidden_SBH, labels_BS):
    """Return the losses from all logits of the unpadded vocabulary, in float64."""
    logits_NV = hidden_SBH.flatten(0, 1) @ layer.weight[:vocab_size].t()
    labels_N = labels_BS.t().flatten()
    losses_N = torch.nn.functional.cross_entropy(logits_NV.double(), labels_N, reduction="none")
    return losses_N.view(hidden_SBH.shape[:2]).t()


@pytest.mark.parametrize("vocab_size", [PADDED, 131])
@pytest.mark.parametrize("piece", [1024, LENGTH * BATCH, 10, 1])  # of 111 tokens
def test_losses_and_gradients_are_those_of_whole_logits(
    frozen_head, monkeypatch, vocab_size, piece
):
    monkeypatch.setattr(frozen_head, "PIECE", piece)
    layer = layer_of(vocab_size, torch.float64)
    hidden_SBH, labels_BS, weights_BS = drawn(vocab_size, torch.float64)
    expected_BS = whole(layer, vocab_size, hidden_SBH, labels_BS)
    got_BS = by_pieces(frozen_head, layer, hidden_SBH, labels_BS)
    torch.testing.assert_close(got_BS, expected_BS, rtol=1e-12, atol=1e-13)
    (expected_SBH,) = torch.autograd.grad((expected_BS * weights_BS).sum(), hidden_SBH)
    (got_SBH,) = torch.autograd.grad((got_BS * weights_BS).sum(), hidden_SBH)
    torch.testing.assert_close(got_SBH, expected_SBH, rtol=1e-12, atol=1e-13)
    assert (got_SBH.transpose(0, 1)[weights_BS == 0] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # labels little likely, and some nearly certain
def test_narrow_numbers_are_summed_in_float32(frozen_head, monkeypatch, dtype, tolerance, scale):
    monkeypatch.setattr(frozen_head, "PIECE", 16)
    layer = layer_of(131, dtype)
    hidden_SBH, labels_BS, weights_BS = drawn(131, dtype, scale)
    if scale > 1:  # the likeliest token, so that the gradient is what is left of its certainty
        labels_BS = (hidden_SBH @ layer.weight[:131].t()).argmax(2).t()
    expected_BS = whole(layer, 131, hidden_SBH, labels_BS)
    got_BS = by_pieces(frozen_head, layer, hidden_SBH, labels_BS)
    assert got_BS.dtype == torch.float32
    assert (got_BS - expected_BS).norm() <= tolerance * expected_BS.norm()
    (expected_SBH,) = torch.autograd.grad((expected_BS * weights_BS).sum(), hidden_SBH)
    (got_SBH,) = torch.autograd.grad((got_BS * weights_BS).sum(), hidden_SBH)
    assert got_SBH.dtype == dtype
    assert (got_SBH - expected_SBH).norm() <= 2 * tolerance * expected_SBH.norm()


def test_without_a_gradient_none_is_computed(frozen_head):
    from torch.utils.flop_counter import FlopCounterMode

    layer = layer_of(131, torch.float32)
    hidden_SBH, labels_BS, _ = drawn(131, torch.float32)
    product = 2 * LENGTH * BATCH * HIDDEN * PADDED
    with FlopCounterMode(display=False) as trained:
        kept = by_pieces(frozen_head, layer, hidden_SBH, labels_BS)
    with FlopCounterMode(display=False) as scored, torch.no_grad():
        losses = by_pieces(frozen_head, layer, hidden_SBH, labels_BS)
    assert (trained.get_total_flops(), scored.get_total_flops()) == (2 * product, product)
    assert losses.equal(kept) and kept.requires_grad and not losses.requires_grad


def test_no_value_is_read_by_the_host(frozen_head, monkeypatch):
    """Check that a CUDA graph can contain it.

    Tensors without memory have no values that could decide anything.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(frozen_head, "PIECE", 16)
    hidden_SBH, labels_BS, weights_BS = drawn(131, torch.bfloat16)
    layer = layer_of(131, torch.bfloat16)
    with FakeTensorMode() as mode:
        layer.weight = torch.nn.Parameter(mode.from_tensor(layer.weight), requires_grad=False)
        hidden_SBH = mode.from_tensor(hidden_SBH)
        labels_BS = mode.from_tensor(labels_BS)
        weights_BS = mode.from_tensor(weights_BS)
        (by_pieces(frozen_head, layer, hidden_SBH, labels_BS) * weights_BS).sum().backward()
    assert hidden_SBH.grad.shape == (LENGTH, BATCH, HIDDEN)
