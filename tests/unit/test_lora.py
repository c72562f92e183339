"""What adapters compute beside the layers they stand on, and that nothing else trains."""

import pytest
import torch

from retemper.pipeline.schema.model import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core's imports

A = "decoder.layers.0.self_attention.linear_qkv.adapters.q.lora_A"
LORA = LoraConfig(rank=2, alpha=4.0, targets=["q"])


@pytest.mark.parametrize(
    ("trainable", "lora", "said"),
    [
        ({A: True, "decoder.layers.0.mlp.linear_fc1.weight": True}, LORA, "not of adapters alone.*linear_fc1.weight"),
        ({A: False, "decoder.layers.0.mlp.linear_fc1.weight": False}, LORA, r"the targets \['q'\] stand on no layer"),
        ({A: True}, LORA.model_copy(update={"targets": ["q", "down"]}), r"the targets \['down'\] stand on no layer"),
        ({"decoder.layers.0.mlp.linear_fc1.weight": False}, None, "full training, but frozen"),
    ],
)
def test_a_method_never_becomes_another(trainable, lora, said):
    from retemper.pipeline.model.lora import check_what_trains

    with pytest.raises(AssertionError, match=said):
        check_what_trains(trainable, lora)
    check_what_trains({A: True, "weight": False}, LORA)
    check_what_trains({"weight": True}, None)


def test_row_norms_are_those_of_the_updated_weight():
    from retemper.pipeline.model.adapter import row_norms

    torch.manual_seed(0)
    weight, A_RI, B_OR = torch.randn(12, 20), torch.randn(3, 20), torch.randn(12, 3)
    torch.testing.assert_close(row_norms(weight, A_RI, B_OR, 0.7), (weight + 0.7 * B_OR @ A_RI).norm(dim=1))
    halves = weight.split(10, dim=1), A_RI.split(10, dim=1)
    parts = iter([(w.square().sum(1), w @ a.T, a @ a.T) for w, a in zip(*halves, strict=True)])
    others = iter(next(parts))
    summed = row_norms(halves[0][1], halves[1][1], B_OR, 0.7, lambda part: part + next(others))
    torch.testing.assert_close(summed, (weight + 0.7 * B_OR @ A_RI).norm(dim=1))


def test_the_principal_factors_are_the_best_of_their_rank():
    from retemper.pipeline.model.adapter import principal_factors

    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    A_RI, B_OR = principal_factors(weight, 4, 2.0)
    rest = weight - 2.0 * B_OR @ A_RI
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:8], torch.linalg.svdvals(weight)[4:])
    assert (A_RI.gather(1, A_RI.abs().argmax(1, keepdim=True)) > 0).all()  # one choice among the signs, at every layout
