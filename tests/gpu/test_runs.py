"""Whole runs on a GPU, at every precision that one of them has: trained, restarted, adapted and exported."""

import pytest
from conftest import launch, overrides

from retemper.pipeline.run_folder import read_metrics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"])
def test_a_run_is_restarted_and_adapted_and_exported(workspace, wide, precision):
    runs = workspace / "runs" / "test"

    def asked(name: str, *changes: str) -> list[str]:
        return overrides(workspace, f"{precision}-{name}", *wide, "checkpoint.save_every_steps=5", f"precision={precision}", *changes)

    def losses(name: str) -> list[float]:
        return [record["loss"] for record in read_metrics(runs / f"{precision}-{name}")]

    base = {"overrides": asked("straight")}
    launch(1, [base, {"overrides": asked("cut"), "stop_after": 7}, {"overrides": asked("cut")}])
    assert len(losses("straight")) == 10
    # Attention's backward pass sums in any order.
    assert losses("cut") == pytest.approx(losses("straight"), rel=1e-3)

    if precision != "fp8_delayed":  # refused: a frozen weight would have a scale of one
        lora = ["method=lora", "method.lora.rank=4", f"init_from={runs / f'{precision}-straight'}", "optimizer.lr=1e-3"]
        launch(1, [{"overrides": asked("lora", *lora)}])
        assert losses("lora")[0] < losses("straight")[0] - 0.3, "it begins where the base ended"
    adapted = f"{precision}-straight" if precision == "fp8_delayed" else f"{precision}-lora"
    exported = {"run": str(runs / adapted), "folder": str(workspace / precision), "step": None, "adapter": False, "base": None}
    launch(1, [{"export": exported | {"tokenizer": None}}], "exchange")
    assert (workspace / precision / "model.safetensors").exists()
