"""Test what needs a GPU with Transformer Engine: `pytest -m gpu`. Two ranks need two GPUs."""

import pytest
import torch
from conftest import launch, overrides

pytestmark = pytest.mark.gpu
LORA = ["method=lora", "init_from=unread", "method.lora.rank=4", "method.lora.alpha=8"]


@pytest.mark.parametrize(
    "layout", [[], ["parallel=tp2"], ["parallel=tp2", "parallel.sequence_parallel=true"]]
)
@pytest.mark.parametrize(
    "method", [[], LORA, [*LORA, "method.lora.targets=mlp"], [*LORA, "method.lora.dora=true"]]
)
def test_fused_layers_compute_what_plain_ones_do(workspace, method, layout):
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    world_size = 2 if layout else 1
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} GPUs are needed, {torch.cuda.device_count()} are here")
    launch(
        world_size,
        [{"probe": "kernels", "overrides": overrides(workspace, "kernels", *method, *layout)}],
        "probes",
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_tensorwise", "fp8_blockwise"])
@pytest.mark.parametrize(
    "changes",
    [[], ["method.lora.targets=[q,v,up]"], ["method.lora.rank=64"], ["model.qkv_bias=true"]],
)
def test_adapted_layers_are_one_function(workspace, wide, changes, precision):
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    asked = overrides(workspace, "adapted", *wide, f"precision={precision}", *LORA, *changes)
    launch(1, [{"probe": "adapted", "overrides": asked}], "probes")


@pytest.mark.parametrize("precision", ["fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp8"])
@pytest.mark.parametrize("method", [[], ["fp8.param_gather=true"], LORA])
def test_8_bits_compute_nearly_what_16_do(workspace, wide, method, precision):
    """Check losses, and that a frozen base with one scale a tensor takes one byte a weight."""
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    asked = overrides(workspace, "fp8", *wide, f"precision={precision}", *method)
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.errors import UserError
    from retemper.pipeline.model.kernels import check_precision

    try:
        check_precision(load_config(asked))
    except UserError as refused:
        pytest.skip(str(refused))
    launch(1, [{"probe": "fp8", "overrides": asked}], "probes")
