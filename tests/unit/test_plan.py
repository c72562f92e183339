"""Test the figures of `retemper plan` against hand counts, its errors, proposals and CPU time."""

import json
import resource
import statistics
import subprocess
import sys

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
    """Return a function that runs the verb, with exit code 1, and returns its standard error."""

    def run(*arguments: str) -> str:
        assert main(["plan", *arguments]) == 1
        return capsys.readouterr().err

    return run


@pytest.fixture
def plan(capsys):
    """Return a function that runs the verb and returns its output."""

    def run(*arguments: str) -> str:
        code = main(["plan", *arguments])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


def bytes_of(said: str, kind: str) -> int:
    (line,) = (line for line in said.splitlines() if line.startswith(f"  {kind} "))
    return int(line.split()[-2].replace(",", ""))


def test_llama2_7b_in_full_on_one_node_is_the_count_by_hand(plan):
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    said = plan(*SEVEN_B, "--price", "2.50")
    assert f"{parameters:,} trainable and 0 frozen parameters" in said
    assert (
        bytes_of(said, "weights") == 2 * parameters
        and bytes_of(said, "gradients") == 4 * parameters
    )
    assert bytes_of(said, "optimizer") == 12 * parameters // 8
    tokens, steps = 192 * 4096, 20_000_000_000 // (192 * 4096)
    rate = 8 * 13_012.9  # of one H200, whose peak is an H100's, with this model and micro-batch
    hours = steps * tokens / rate / 3600
    assert f"{steps:,} steps of {tokens:,} tokens" in said and f"{rate:,.0f} tokens/s" in said
    assert (
        f"{hours / 24:.1f} days, {8 * hours:,.1f} GPU-hours, {8 * hours * 2.5:,.0f} at 2.5 each"
        in said
    )
    assert f"1 of {14 * parameters / 2**30:.2f} GiB" in said
    assert (
        f"starcoder_python: {steps * 192:,} samples needed; shards/unmade holds no token corpus yet"
        in said
    )


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: measured.part)
def test_rates_are_those_of_the_bench(measured):
    result = json.loads((ROOT / "bench" / measured.file).read_text())
    record = result.get("parts", result)[measured.part]
    assert measured.tokens_per_second == pytest.approx(record["tokens_per_second"], abs=0.05)
    assert measured.commit == record["commit"]
    assert measured.gpu in record.get("machine", result.get("machine"))["gpu"]


LORA = ["method=lora", "init_from=unread"]


@pytest.mark.parametrize(
    ("asked", "tokens_per_second", "commit"),
    [
        (["precision=fp8_tensorwise"], 8 * 18_285.4, "645f4c6"),
        (["precision=fp8_delayed"], 8 * 18_285.4, "645f4c6"),  # not measured, but in 8 bits
        (LORA, 8 * 17_264.1, "6f6be28"),
        ([*LORA, "train.micro_batch_size=2"], 8 * 17_264.1, "6f6be28"),
        ([*LORA, "precision=fp8_tensorwise"], 8 * 22_587.9, "6f6be28"),
        ([*LORA, "method.lora.dropout=0.1"], 8 * 14_021.0, "97556e7"),  # not fused
        ([*LORA, "precision=fp8_blockwise", "method.lora.kernel=plain"], 8 * 14_667.2, "97556e7"),
        (["--gpu", "NVIDIA H100 PCIe"], 8 * 13_012.9 * 756 / 989, "645f4c6"),  # of its peak
    ],
)
def test_time_is_by_the_nearest_measurement(plan, asked, tokens_per_second, commit):
    said = plan(*SEVEN_B, *asked, "--gpu-memory", "141")
    (line,) = (line for line in said.splitlines() if line.startswith("time: "))
    assert float(line.split()[1].replace(",", "")) == pytest.approx(tokens_per_second, rel=1e-4)
    assert f"  this MFU was measured on one H200 at commit {commit}: " in said


@pytest.mark.parametrize(
    ("asked", "mfu", "said"),
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
def test_a_share_of_the_peak_is_asked_for_or_assumed_where_nothing_was_measured(
    plan, asked, mfu, said
):
    lines = plan(*SEVEN_B, *asked).splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("time: "))
    assert f" at MFU {mfu} of " in lines[at] and lines[at + 1] == f"  {said}"


def test_of_a_frozen_base_there_are_weights_alone(plan):
    said = plan(*SEVEN_B, "method=lora", "init_from=unread", "checkpoint.save_every_steps=1000")
    base = 6_738_415_616
    adapters = 32 * 16 * ((4096 + 4096) * 4 + (4096 + 11008) * 3)
    assert bytes_of(said, "weights") == 2 * base and bytes_of(said, "adapters") == 2 * adapters
    assert (
        bytes_of(said, "gradients") == 4 * adapters
        and bytes_of(said, "optimizer") == 12 * adapters // 8
    )
    assert f"26 of {14 * adapters / 2**20:.2f} MiB, adapters alone" in said


def test_what_does_not_fit_is_refused_and_what_is_proposed_does(plan, refused):
    tight = [*SEVEN_B, "train.micro_batch_size=8", "--gpu-memory", "40"]
    said = refused(*tight)
    assert (
        said.startswith("error: the run needs ") and "of whose 40 GiB 36.00 GiB can be used" in said
    )
    proposed = said.split(" do with ")[1].split()
    assert all(key.startswith(("parallel.", "train.micro_batch_size=")) for key in proposed)
    assert "8 ranks" in plan(*tight, *proposed)
    # Less of a change does not do: each proposed change is needed.
    for key in proposed:
        if "data_parallel" not in key:
            assert refused(*tight, *(other for other in proposed if other != key)), key


def test_what_no_layout_helps_is_said(refused):
    assert "makes it fit on 8 GPUs: take more of them" in refused(*SEVEN_B, "--gpu-memory", "4")


def test_stages_lie_on_nodes_and_tensor_parallelism_across_them_is_warned_of(plan):
    layout = [
        "parallel.tensor_parallel_size=4",
        "parallel.pipeline_parallel_size=2",
        "parallel.data_parallel_size=2",
    ]
    said = plan(*SEVEN_B, *layout)
    assert "16 ranks on 2 × 8 GPUs" in said and "warning" not in said
    assert "  stage 0: ranks 0-7, node 0\n  stage 1: ranks 8-15, node 1\n" in said
    assert "warning: tensor parallelism crosses nodes" in plan(
        *SEVEN_B, *layout, "--gpus-per-node", "2"
    )


def test_the_data_is_compared_with_the_manifest(plan, workspace):
    said = plan(
        *overrides(
            workspace,
            "planned",
            f"data.replay.path={workspace / 'data' / 'code'}",
            "data.replay.fraction=0.1",
        )
    )
    assert (
        "data: math: 72 samples needed, " in said
        and "data: replay: 8 samples needed, " in said
        and " epochs" in said
    )


# Those of which full training does not fit, with AdamW's float32 states.
LORA_ALONE = ["llama2_7b_1gpu", "llama2_13b_1gpu", "llama2_70b_8gpus"]
LAYOUTS = [name for name in preset_names("parallel") if name.startswith("llama2_")]


def of_preset(preset: str, *more: str) -> list[str]:
    model = preset.rpartition("_")[0]
    return [*SEVEN_B[:-1], f"model={model}", f"parallel={preset}", *more]


def test_there_are_layouts_for_every_model_and_number_of_gpus():
    sizes = {
        (size, gpus)
        for size in ("7b", "13b", "70b")
        for gpus in ("1gpu", "8gpus", "32gpus", "128gpus")
    }
    assert set(LAYOUTS) == {f"llama2_{size}_{gpus}" for size, gpus in sizes - {("70b", "1gpu")}}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_every_layout_fits_what_it_is_for(plan, refused, preset):
    gpus = int(preset.rpartition("_")[2].rstrip("gpus"))
    said = plan(*of_preset(preset, "method=lora", "init_from=unread"))
    assert f"layout: {gpus} ranks on" in said and "warning" not in said
    if preset in LORA_ALONE:
        assert "of whose 80 GiB 72.00 GiB can be used" in refused(*of_preset(preset))
    else:
        assert f"layout: {gpus} ranks on" in plan(*of_preset(preset))


def test_70b_does_not_fit_one_gpu(refused):
    """Check that no layout is proposed: not even the frozen weights in FP8 fit."""
    asked = [
        "model=llama2_70b",
        "parallel=single",
        "method=lora",
        "init_from=unread",
        "precision=fp8_tensorwise",
    ]
    assert "makes it fit on 1 GPUs" in refused(*SEVEN_B[:-1], *asked)


@pytest.mark.parametrize("preset", preset_names("run"))
def test_every_shipped_run_is_planned(plan, preset):
    assert "of 80 GiB can be used" in plan(f"run={preset}")


def test_a_plan_is_light():
    """Check that a plan takes less CPU time than an import of torch.

    Both run in turn, because machines differ and are busy.
    """
    code = (
        "import sys; from retemper.pipeline.cli import main; main(sys.argv[1:]); "
        "print({'torch', 'megatron'} & sys.modules.keys())"
    )

    def measured(*command: str) -> tuple[float, subprocess.CompletedProcess]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(
            [sys.executable, "-c", *command], cwd=ROOT, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result

    ratios = []
    for _ in range(3):
        taken, result = measured(code, "plan", *SEVEN_B, "--gpu-memory", "30")
        assert result.stdout.endswith("set()\n") and "do with" in result.stderr
        ratios.append(taken / measured("import torch")[0])
    assert statistics.median(ratios) < 1
