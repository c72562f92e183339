"""Test 8-bit precisions without a GPU.

The tests cover the errors, the settings for megatron-core, and the planned memory of a rank.
"""

import subprocess
import sys

import pytest
from conftest import ROOT, overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.estimate.memory import rank_memory
from retemper.pipeline.schema.model import ModelSetup

RECIPES = {
    "fp8_delayed": "delayed",
    "fp8_tensorwise": "tensorwise",
    "fp8_blockwise": "blockwise",
    "mxfp8": "mxfp8",
}
LORA = ["method=lora", "init_from=unread"]
SEVEN_B = [
    "study=s",
    "name=n",
    "model=llama2_7b",
    "data=starcoder_python",
    "data.path=shards/unmade",
    "train.tokens=1B",
]
SEVEN_B += ["train.global_batch_size=8", "train.micro_batch_size=1", "optimizer.lr=1e-5"]
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # weights of the linear layers


def problems_of(*changes: str) -> str:
    """Return the message with which the config of a 7B run is refused."""
    with pytest.raises(UserError) as error:
        load_config([*SEVEN_B, *changes])
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["fp8.bf16_layers=1"], "fp8.* is set, but precision=bf16"),
        (
            ["precision=fp8_delayed", "fp8.bf16_layers=1"],
            "fp8.bf16_layers cannot be combined with precision=fp8_delayed",
        ),
        (["precision=mxfp8", "fp8.param_gather=true"], "leave it out"),
        (
            ["precision=fp8_tensorwise", "fp8.param_gather=true", *LORA],
            "the base is stored in FP8 anyway",
        ),
        (["precision=fp8_delayed", *LORA], "set precision=fp8_tensorwise with method=lora"),
        (
            [
                "precision=fp8_tensorwise",
                "data.seq_length=100",
                "train.micro_batch_size=2",
                "evals.heldout.code=c",
            ],
            "may run any number of samples",
        ),
        (
            ["parallel.tensor_parallel_overlap=true", "precision=fp8_blockwise"],
            "cannot be combined with precision=fp8_blockwise",
        ),
        (
            ["precision=fp8_tensorwise", *LORA, "method.lora.dora=true"],
            "cannot be combined with method.lora.dora or pissa",
        ),
        (
            ["precision=fp8_tensorwise", "fp8.bf16_layers=17", "parallel.pipeline_parallel_size=2"],
            "more than the 16 layers of a pipeline",
        ),
        (
            ["precision=fp8_tensorwise", "model.ffn_hidden_size=11000"],
            "requires numbers of features divisible by 16, but gate has 11000 on a rank",
        ),
        (
            ["precision=mxfp8", "data.seq_length=24"],
            "requires micro-batches whose number of tokens is divisible by 32",
        ),
        (["parallel.tensor_parallel_overlap=true"], "needs parallel.sequence_parallel=true"),
        (
            ["parallel.tensor_parallel_overlap=true", "evals.heldout.code=c"],
            "set evals.micro_batch_size=1 and evals.max_samples to",
        ),
    ],
)
def test_incompatible_settings_are_refused(changes, message):
    assert message in problems_of(*changes)


def test_fp8_without_a_gpu_is_refused_before_the_run_folder_exists(workspace):
    command = [
        sys.executable,
        "-m",
        "retemper.pipeline.train",
        *overrides(workspace, "fp8", "precision=fp8_delayed"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert not (workspace / "runs" / "test" / "fp8").exists()
    assert result.stderr == (
        "error: precision=fp8_delayed needs an NVIDIA GPU, and torch finds none here; "
        "set precision=bf16, which runs everywhere\n"
    )


@pytest.mark.parametrize(("precision", "recipe"), RECIPES.items())
def test_the_megatron_config_has_the_recipe(precision, recipe):
    from retemper.pipeline.distributed.topology import prepare_megatron

    prepare_megatron()
    from retemper.pipeline.model.build import transformer_config

    for method, in_fp8 in (([], False), (LORA, True))[: 1 if recipe == "delayed" else 2]:
        setup = load_config([*SEVEN_B, f"precision={precision}", *method])
        settings = transformer_config(setup)
        assert settings.bf16
        assert settings.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
        assert settings.fp8_recipe == recipe
        assert settings.fp8_param == in_fp8
        assert not settings.first_last_layers_bf16
    if recipe != "delayed":
        settings = transformer_config(
            load_config([*SEVEN_B, f"precision={precision}", "fp8.bf16_layers=2"])
        )
        assert settings.first_last_layers_bf16
        assert settings.num_layers_at_start_in_bf16 == settings.num_layers_at_end_in_bf16 == 2


@pytest.mark.parametrize(
    ("changes", "bytes_per_weight"),
    [
        (["precision=fp8_tensorwise", *LORA], 1),
        (["precision=fp8_delayed", "fp8.param_gather=true"], 2),  # each weight and its transpose
        (["precision=fp8_delayed"], 4),  # and the trained weights in bf16
        (["precision=mxfp8", *LORA], 2 + 2 / 32),
        (["precision=fp8_tensorwise", "fp8.bf16_layers=4", *LORA], 1 + 8 / 32),
    ],
)
def test_weights_are_counted_in_their_stored_precision(changes, bytes_per_weight):
    in_bf16 = rank_memory(load_config([*SEVEN_B, *(LORA if "method=lora" in changes else [])]), 0)
    in_fp8 = rank_memory(load_config([*SEVEN_B, *changes]), 0)
    assert in_bf16.weights - in_fp8.weights == round(LINEAR * (2 - bytes_per_weight))
    assert (in_bf16.adapters, in_bf16.gradients, in_bf16.optimizer) == (
        in_fp8.adapters,
        in_fp8.gradients,
        in_fp8.optimizer,
    )


def test_a_config_from_before_fp8_is_read():
    config = load_config(SEVEN_B).model_dump()
    del config["fp8"]
    assert (
        ModelSetup.of(
            config,
            ModelSetup.model_validate(
                {k: config[k] for k in ("model", "method", "parallel")}
            ).parallel,
        ).fp8_recipe
        is None
    )
