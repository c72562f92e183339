"""Test `retemper plan`: its figures against counts by hand, its errors, proposals and CPU time."""

import json

import pytest
from conftest import ROOT, overrides

from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import preset_names
from retemper.pipeline.estimate.rates import MEASURED

SEVEN_B = [
    *[
        "study=paper",
        "name=full",
        "model=llama2_7b",
        "data=starcoder_python",
        "data.path=shards/unmade",
        "train.tokens=20B",
    ],
    *[
        "train.global_batch_size=192",
        "train.micro_batch_size=1",
        "optimizer.lr=1e-5",
        "parallel.data_parallel_size=8",
    ],
]


@pytest.fixture
def refused(capsys):
    """Return a function that runs `plan`, expects exit code 1, and returns standard error."""

    def run(*arguments: str) -> str:
        assert main(["plan", *arguments]) == 1
        return capsys.readouterr().err

    return run


@pytest.fixture
def plan(capsys):
    """Return a function that runs `plan`, expects success, and returns standard output."""

    def run(*arguments: str) -> str:
        code = main(["plan", *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def bytes_of(output: str, kind: str) -> int:
    (line,) = (line for line in output.splitlines() if line.startswith(f"  {kind} "))
    return int(line.split()[-2].replace(",", ""))


def test_plan_of_llama2_7b_on_one_node_matches_a_count_by_hand(plan):
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    output = plan(*SEVEN_B, "--price", "2.50")
    assert f"{parameters:,} trainable and 0 frozen parameters" in output
    assert bytes_of(output, "weights") == 2 * parameters
    assert bytes_of(output, "gradients") == 4 * parameters
    assert bytes_of(output, "optimizer") == 12 * parameters // 8
    tokens = 192 * 4096
    steps = 20_000_000_000 // tokens
    # Measured on one H200, whose peak is that of an H100, with this model and micro-batch size.
    rate = 8 * 13_012.9
    hours = steps * tokens / rate / 3600
    assert f"{steps:,} steps of {tokens:,} tokens" in output
    assert f"{rate:,.0f} tokens/s" in output
    assert (
        f"{hours / 24:.1f} days, {8 * hours:,.1f} GPU-hours, {8 * hours * 2.5:,.0f} at 2.5 each"
        in output
    )
    assert f"1 of {14 * parameters / 2**30:.2f} GiB" in output
    assert (
        f"starcoder_python: {steps * 192:,} samples needed; shards/unmade holds no token corpus yet"
        in output
    )


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: measured.part)
def test_measured_rates_equal_the_benchmark_results(measured):
    result = json.loads((ROOT / "benchmarks" / "results" / measured.file).read_text())
    record = result.get("parts", result)[measured.part]
    assert measured.tokens_per_second == pytest.approx(record["tokens_per_second"], abs=0.05)
    assert measured.commit == record["commit"]
    assert measured.gpu in record.get("machine", result.get("machine"))["gpu"]


LORA = ["method=lora", "init_from=unread"]


@pytest.mark.parametrize(
    ("arguments", "tokens_per_second", "commit"),
    [
        (["precision=fp8_tensorwise"], 8 * 18_285.4, "645f4c6"),
        (["precision=fp8_delayed"], 8 * 18_285.4, "645f4c6"),  # as tensorwise, also 8 bits
        (LORA, 8 * 17_456.8, "9953758"),
        ([*LORA, "train.micro_batch_size=2"], 8 * 17_731.4, "9953758"),
        ([*LORA, "precision=fp8_tensorwise"], 8 * 23_106.0, "9953758"),
        ([*LORA, "method.lora.dropout=0.1"], 8 * 14_021.0, "97556e7"),  # not fused
        ([*LORA, "precision=fp8_blockwise", "method.lora.kernel=plain"], 8 * 16_221.3, "9953758"),
        (["--gpu", "NVIDIA H100 PCIe"], 8 * 13_012.9 * 756 / 989, "645f4c6"),  # by its peak
    ],
)
def test_time_follows_the_nearest_measurement(plan, arguments, tokens_per_second, commit):
    output = plan(*SEVEN_B, *arguments, "--gpu-memory", "141")
    (line,) = (line for line in output.splitlines() if line.startswith("time: "))
    assert float(line.split()[1].replace(",", "")) == pytest.approx(tokens_per_second, rel=1e-4)
    assert f"  this MFU was measured on one H200 at commit {commit}: " in output


@pytest.mark.parametrize(
    ("arguments", "mfu", "source"),
    [
        (
            ["--gpu", "A100"],
            0.4,
            "this MFU is assumed: nothing was measured with method=full precision=bf16 "
            "on a card like A100",
        ),
        (["--mfu", "0.4"], 0.4, "this MFU was asked for"),
        (["--mfu", "0.3"], 0.3, "this MFU was asked for"),
    ],
)
def test_mfu_is_given_or_assumed_without_a_measurement(plan, arguments, mfu, source):
    lines = plan(*SEVEN_B, *arguments).splitlines()
    (index,) = (number for number, line in enumerate(lines) if line.startswith("time: "))
    assert f" at MFU {mfu} of " in lines[index]
    assert lines[index + 1] == f"  {source}"


def test_time_of_a_model_that_cannot_fill_a_gpu_is_unknown_unless_given(plan):
    tiny = ["run=demo_base", "precision=bf16", "--gpu", "H100", "--gpu-memory", "80"]
    assert "too small to fill a GPU" in plan(*tiny)
    assert " at MFU 0.1 of H100" in plan(*tiny, "--mfu", "0.1")


def test_frozen_base_has_weights_but_no_gradients_or_optimizer_state(plan):
    output = plan(*SEVEN_B, "method=lora", "init_from=unread", "checkpoint.save_every_steps=1000")
    base = 6_738_415_616
    adapters = 32 * 16 * ((4096 + 4096) * 4 + (4096 + 11008) * 3)
    assert bytes_of(output, "weights") == 2 * base
    assert bytes_of(output, "adapters") == 2 * adapters
    assert bytes_of(output, "gradients") == 4 * adapters
    assert bytes_of(output, "optimizer") == 12 * adapters // 8
    assert f"26 of {14 * adapters / 2**20:.2f} MiB, adapters alone" in output


def test_layout_that_does_not_fit_is_refused_and_the_proposed_one_fits(plan, refused):
    tight = [*SEVEN_B, "train.micro_batch_size=8", "--gpu-memory", "40"]
    message = refused(*tight)
    assert message.startswith("error: the run needs ")
    assert "of whose 40 GiB 36.00 GiB can be used" in message
    proposed = message.split(" do with ")[1].split()
    assert all(key.startswith(("parallel.", "train.micro_batch_size=")) for key in proposed)
    assert "8 ranks" in plan(*tight, *proposed)
    # Each proposed change is needed: without it the run does not fit.
    for key in proposed:
        if "data_parallel" not in key:
            assert refused(*tight, *(other for other in proposed if other != key)), key


def test_error_says_when_no_layout_fits(refused):
    assert "makes it fit on 8 GPUs: take more of them" in refused(*SEVEN_B, "--gpu-memory", "4")


def test_stages_are_placed_on_nodes_and_cross_node_tensor_parallelism_warns(plan):
    layout = [
        "parallel.tensor_parallel_size=4",
        "parallel.pipeline_parallel_size=2",
        "parallel.data_parallel_size=2",
    ]
    output = plan(*SEVEN_B, *layout)
    assert "16 ranks on 2 × 8 GPUs" in output
    assert "warning" not in output
    assert "  stage 0: ranks 0-7, node 0\n  stage 1: ranks 8-15, node 1\n" in output
    assert "warning: tensor parallelism crosses nodes" in plan(
        *SEVEN_B, *layout, "--gpus-per-node", "2"
    )


def test_needed_samples_are_compared_with_the_manifest(plan, workspace):
    output = plan(
        *overrides(
            workspace,
            "planned",
            f"data.replay.path={workspace / 'data' / 'code'}",
            "data.replay.fraction=0.1",
        )
    )
    assert "data: math: 72 samples needed, " in output
    assert "data: replay: 8 samples needed, " in output
    assert " epochs" in output


# The layouts in which full training with AdamW's float32 states does not fit.
LORA_ONLY = ["llama2_7b_1gpu", "llama2_13b_1gpu", "llama2_70b_8gpus"]
LAYOUTS = [name for name in preset_names("parallel") if name.startswith("llama2_")]


def arguments_of_preset(preset: str, *more: str) -> list[str]:
    model = preset.rpartition("_")[0]
    return [*SEVEN_B[:-1], f"model={model}", f"parallel={preset}", *more]


def test_every_model_and_gpu_count_has_a_layout_preset():
    sizes = {
        (size, gpus)
        for size in ("7b", "13b", "70b")
        for gpus in ("1gpu", "8gpus", "32gpus", "128gpus")
    }
    assert set(LAYOUTS) == {f"llama2_{size}_{gpus}" for size, gpus in sizes - {("70b", "1gpu")}}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_layout_preset_fits_its_model_and_gpu_count(plan, refused, preset):
    gpus = int(preset.rpartition("_")[2].rstrip("gpus"))
    output = plan(*arguments_of_preset(preset, "method=lora", "init_from=unread"))
    assert f"layout: {gpus} ranks on" in output
    assert "warning" not in output
    if preset in LORA_ONLY:
        assert "of whose 80 GiB 72.00 GiB can be used" in refused(*arguments_of_preset(preset))
    else:
        assert f"layout: {gpus} ranks on" in plan(*arguments_of_preset(preset))


def test_llama2_70b_does_not_fit_on_one_gpu(refused):
    """Check that no layout is proposed, because not even the frozen weights in FP8 fit."""
    arguments = [
        "model=llama2_70b",
        "parallel=single",
        "method=lora",
        "init_from=unread",
        "precision=fp8_tensorwise",
    ]
    assert "makes it fit on 1 GPU:" in refused(*SEVEN_B[:-1], *arguments)


@pytest.mark.parametrize("preset", [name for name in preset_names("run") if "demo" in name])
def test_every_preset_of_the_demo_can_be_planned(plan, preset):
    assert "of 80 GiB can be used" in plan(f"run={preset}")
