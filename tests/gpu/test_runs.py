"""Test whole runs on a GPU, at every precision it supports: training, restart, LoRA and export."""

import pytest
from conftest import launch, overrides

from retemper.pipeline.runs.run_folder import read_metrics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"])
def test_a_run_is_restarted_and_adapted_and_exported(workspace, wide, precision):
    runs = workspace / "runs" / "test"

    def asked(name: str, *changes: str) -> list[str]:
        return overrides(
            workspace,
            f"{precision}-{name}",
            *wide,
            "checkpoint.save_every_steps=5",
            f"precision={precision}",
            *changes,
        )

    def losses(name: str) -> list[float]:
        return [record["loss"] for record in read_metrics(runs / f"{precision}-{name}")]

    base = {"overrides": asked("straight")}
    launch(1, [base, {"overrides": asked("cut"), "stop_after": 7}, {"overrides": asked("cut")}])
    assert len(losses("straight")) == 10
    # Attention's backward pass sums in any order.
    assert losses("cut") == pytest.approx(losses("straight"), rel=1e-3)

    if precision != "fp8_delayed":  # refused: a frozen weight would have a scale of one
        lora = [
            "method=lora",
            "method.lora.rank=4",
            f"init_from={runs / f'{precision}-straight'}",
            "optimizer.lr=1e-3",
        ]
        launch(1, [{"overrides": asked("lora", *lora)}])
        assert losses("lora")[0] < losses("straight")[0] - 0.3, "it begins where the base ended"
    adapted = f"{precision}-straight" if precision == "fp8_delayed" else f"{precision}-lora"
    exported = {
        "run": str(runs / adapted),
        "folder": str(workspace / precision),
        "step": None,
        "adapter": False,
        "base": None,
    }
    launch(1, [{"export": exported | {"tokenizer": None}}], "exchange")
    assert (workspace / precision / "model.safetensors").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
@pytest.mark.parametrize("method", ["full", "lora", "dropout"])
def test_recorded_passes_train_as_others_do(workspace, wide, precision, method):
    """Compare runs with scores of held-out text in between, and with a restart.

    The comparison has a tolerance, because attention's backward pass sums in any order.
    """
    changes = (
        []
        if method == "full"
        else ["method=lora", "init_from=unread", "method.lora.rank=4", "optimizer.lr=1e-3"]
    )
    if method == "dropout":
        changes.append("method.lora.dropout=0.1")
    if method != "full":
        launch(
            1,
            [
                {
                    "overrides": overrides(
                        workspace,
                        f"graph-{precision}-base",
                        *wide,
                        f"precision={precision}",
                        "train.cuda_graph=on",
                    )
                }
            ],
        )
        changes[1] = f"init_from={workspace / 'runs' / 'test' / f'graph-{precision}-base'}"

    def run(name: str, *more: str, **how) -> dict:
        asked = [
            "train.micro_batch_size=2",
            "checkpoint.save_every_steps=5",
            f"precision={precision}",
            *changes,
            *more,
        ]
        return {
            "overrides": overrides(workspace, f"graph-{precision}-{method}-{name}", *wide, *asked)
        } | how

    on = "train.cuda_graph=on"
    launch(
        1,
        [
            run("off", "train.cuda_graph=off"),
            run("on", on),
            run("cut", on, stop_after=7),
            run("cut", on),
        ],
    )

    def losses(name: str) -> list[float]:
        return [
            record["loss"]
            for record in read_metrics(
                workspace / "runs" / "test" / f"graph-{precision}-{method}-{name}"
            )
        ]

    assert losses("on") == pytest.approx(losses("off"), rel=1e-3)
    assert losses("cut") == pytest.approx(losses("off"), rel=1e-3)
