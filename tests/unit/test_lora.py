"""Test LoRA: what the adapters compute, their scale, and that nothing else is trainable."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.errors import UserError
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.model import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core's imports

A = "decoder.layers.0.self_attention.linear_qkv.adapters.q.lora_A"
LORA = LoraConfig(rank=2, alpha=4.0, targets=["q"])


@pytest.mark.parametrize(
    ("trainable", "lora", "message"),
    [
        (
            {A: True, "decoder.layers.0.mlp.linear_fc1.weight": True},
            LORA,
            "other parameters than adapters are trainable.*linear_fc1.weight",
        ),
        (
            {A: False, "decoder.layers.0.mlp.linear_fc1.weight": False},
            LORA,
            r"no layer has an adapter for the targets \['q'\]",
        ),
        (
            {A: True},
            LORA.model_copy(update={"targets": ["q", "down"]}),
            r"no layer has an adapter for the targets \['down'\]",
        ),
        ({"decoder.layers.0.mlp.linear_fc1.weight": False}, None, "method=full, but frozen"),
    ],
)
def test_trainable_parameters_that_contradict_the_method_are_refused(trainable, lora, message):
    from retemper.pipeline.model.lora import check_trainable_parameters

    with pytest.raises(AssertionError, match=message):
        check_trainable_parameters(trainable, lora)
    check_trainable_parameters({A: True, "weight": False}, LORA)
    check_trainable_parameters({"weight": True}, None)


def test_row_norms_are_those_of_the_updated_weight():
    from retemper.pipeline.model.adapter import row_norms

    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    A_RI = torch.randn(3, 20)
    B_OR = torch.randn(12, 3)
    torch.testing.assert_close(
        row_norms(weight, A_RI, B_OR, 0.7), (weight + 0.7 * B_OR @ A_RI).norm(dim=1)
    )
    halves = weight.split(10, dim=1), A_RI.split(10, dim=1)
    parts = iter([(w.square().sum(1), w @ a.T, a @ a.T) for w, a in zip(*halves, strict=True)])
    others = iter(next(parts))
    summed = row_norms(halves[0][1], halves[1][1], B_OR, 0.7, lambda part: part + next(others))
    torch.testing.assert_close(summed, (weight + 0.7 * B_OR @ A_RI).norm(dim=1))


def test_adapters_of_one_input_share_a_dropout_mask_which_differ_in_peft():
    import peft
    from megatron.core.transformer import TransformerConfig

    from retemper.pipeline.model.lora import ColumnAdapters, GateUpOutputs

    class Layer(GateUpOutputs, ColumnAdapters, torch.nn.Module):
        def __init__(self, lora: LoraConfig):
            super().__init__()
            self.bias = None
            self.config = TransformerConfig(
                num_layers=1, hidden_size=64, num_attention_heads=1, ffn_hidden_size=64
            )
            self.add_adapters(lora, ["gate", "up"], 64, GroupOfOne(), fused=False)

    class GroupOfOne:
        def size(self) -> int:
            return 1

    torch.manual_seed(0)
    lora = LoraConfig(rank=64, alpha=64.0, targets=["gate", "up"], dropout=0.5)
    layer = Layer(lora)
    for factor in layer.parameters():  # both updates are the input, as dropout leaves it
        torch.nn.init.eye_(factor)
    x_SBI = torch.ones(1, 1, 64)
    gate, up = layer.with_adapters(torch.zeros(1, 1, 128), x_SBI).chunk(2, dim=-1)
    assert gate.equal(up)
    assert set(gate.flatten().tolist()) == {0.0, 2.0}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("gate", "up")})
    settings = peft.LoraConfig(r=64, target_modules=["gate", "up"], lora_dropout=0.5)
    theirs = peft.inject_adapter_in_model(settings, model)
    masks = [theirs[name].lora_dropout["default"](x_SBI) for name in ("gate", "up")]
    assert not masks[0].equal(masks[1])


def test_principal_factors_are_the_best_approximation_of_their_rank():
    from retemper.pipeline.model.adapter import principal_factors

    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    A_RI, B_OR = principal_factors(weight, 4, 2.0)
    rest = weight - 2.0 * B_OR @ A_RI
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:8], torch.linalg.svdvals(weight)[4:])
    # The signs of a singular vector are arbitrary; this choice is the same at every layout.
    assert (A_RI.gather(1, A_RI.abs().argmax(1, keepdim=True)) > 0).all()


def lora_config(folder: Path, *changes: str):
    return load_config(overrides(folder, "lora", "method=lora", "init_from=unread", *changes))


@pytest.mark.parametrize(
    ("changes", "alpha", "scale"),
    [
        ([], 32.0, 2.0),
        (["method.lora.rank=4"], 8.0, 2.0),  # a fixed alpha of 32 would give a scale of 8
        (["method.lora.rank=256"], 512.0, 2.0),  # and here of 0.125
        (["method.lora.rank=1", "method.lora.dora=true"], 2.0, 2.0),
        (["method.lora.rank=4", "method.lora.alpha=32"], 32.0, 8.0),
        (["method.lora.rank=4", "method.lora.alpha=null"], 8.0, 2.0),
        (["method.lora.rank=8", "method.lora.alpha=3.5"], 3.5, 0.4375),
        (["method.lora.rank=16", "method.lora.rslora=true", "method.lora.alpha=8"], 8.0, 2.0),
        (["method.lora.rank=16", "method.lora.rslora=true", "method.lora.alpha=32"], 32.0, 8.0),
    ],
)
def test_the_default_alpha_is_twice_the_rank_and_is_stored_as_a_number(
    tmp_path, changes, alpha, scale
):
    from retemper.pipeline.model.adapter import lora_scaling

    config = lora_config(tmp_path, *changes)
    stored = json.loads(config.to_json())["method"]["lora"]
    assert stored["alpha"] == alpha
    assert lora_scaling(config.method.lora) == scale
    assert LoraConfig(**stored) == config.method.lora


@pytest.mark.parametrize("rank", [4, 7, 16, 256])
def test_rslora_requires_an_alpha_and_suggests_one_that_gives_a_scale_of_two(tmp_path, rank):
    from retemper.pipeline.model.adapter import lora_scaling

    changes = [f"method.lora.rank={rank}", "method.lora.rslora=true"]
    with pytest.raises(UserError) as refusal:
        lora_config(tmp_path, *changes)
    (alpha,) = re.findall(
        rf"with method.lora.rank={rank} (method.lora.alpha=\S+) gives a scale of 2",
        str(refusal.value),
    )
    assert lora_scaling(lora_config(tmp_path, *changes, alpha).method.lora) == pytest.approx(
        2, rel=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["method.lora.rank=0"],
        ["method.lora.rank=four"],
        ["method.lora.alpha=0"],
        ["method.lora.rslora=7"],
    ],
)
def test_an_invalid_lora_value_is_named(tmp_path, changes):
    with pytest.raises(UserError, match=changes[0].partition("=")[0]):
        lora_config(tmp_path, *changes)


def test_a_started_run_keeps_its_alpha(tmp_path):
    changes = ["method.lora.rank=4"]
    stored = lora_config(tmp_path, *changes, "method.lora.alpha=32")
    stored.run_dir.mkdir(parents=True)
    (stored.run_dir / "config.json").write_text(stored.to_json())
    assert lora_config(tmp_path, *changes) == stored == load_run(stored.run_dir, [])
    run_folder.check_resumable(lora_config(tmp_path, *changes))
    assert lora_config(tmp_path, *changes, "method.lora.alpha=8").method.lora.alpha == 8


def test_the_introduction_of_a_run_states_the_scale_of_its_adapters(tmp_path):
    from retemper.pipeline.train.branches import introduction

    first, *measured = introduction(lora_config(tmp_path, "method.lora.rank=4"))
    assert first == "LoRA: rank 4, alpha 8: updates are scaled by 2"
    assert "what it learns is measured on held-out math" in measured
    assert introduction(load_config(overrides(tmp_path, "full"))) == []


def test_the_introduction_of_a_run_names_what_prevents_the_fused_kernel(tmp_path):
    from retemper.pipeline.train.branches import introduction

    changes = ["parallel=dp2", "parallel.overlap=true", "method.lora.dropout=0.1"]
    _, second, *_ = introduction(lora_config(tmp_path, *changes))
    assert second.endswith("due to method.lora.dropout and parallel.overlap")
    assert "slower" not in " ".join(introduction(lora_config(tmp_path, "method.lora.kernel=plain")))
