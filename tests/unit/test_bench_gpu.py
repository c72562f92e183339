"""Test the GPU benchmarks on a CPU: the summary of a trace, and the scripts at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_correct
import gpu_full
import gpu_lora
import gpu_machine
import gpu_parts
import gpu_table
import gpu_trace
import pytest
from conftest import ROOT

BENCH = ROOT / "benchmarks"

# Names of the kernels of cuBLAS, cuDNN, Transformer Engine, torch and Triton on Hopper.
BF16_PRODUCT = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"
FP8_PRODUCT = "nvjet_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT"
ATTENTION = (
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
)
SUM = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>"
NAMES = {
    "products": [
        BF16_PRODUCT,
        FP8_PRODUCT,
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_segment_k_off_kernel",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
    ],
    "attention": [
        ATTENTION,
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<> > >",
    ],
    "elementwise": [
        SUM,
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(), "
        "at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >",
    ],
    "norms_rope_swiglu": [
        "triton_poi_fused__to_copy_mul_silu_split_0",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits<float> >",
        "void transformer_engine::fused_qkv_rope_forward_kernel<__nv_bfloat16>",
    ],
    "quantising": [
        "void transformer_engine::unary_kernel<8, true, float, __nv_bfloat16, __nv_fp8_e4m3>",
        "void transformer_engine::detail::cast_transpose_fused_kernel_notaligned<false, false>",
        "void transformer_engine::(anonymous namespace)::amax_kernel<8, true, __nv_bfloat16>",
        "transformer_engine::(anonymous namespace)::transpose_general_kernel",
    ],
    "optimizer": [
        "void transformer_engine::multi_tensor_apply_kernel<TensorListMetadata<4, false> >",
        "_lion_kernel",
    ],
    "communication": ["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    "other": ["a_kernel_that_nobody_knows"],
}


def event(name: str, start: float, duration: float, *, kernel: bool = True) -> gpu_trace.Event:
    return gpu_trace.Event(name, start, duration, kernel)


@pytest.mark.parametrize("kind", NAMES)
def test_kernels_are_classified_by_name(kind):
    found = {name: gpu_trace.kind_of(event(name, 0, 10)) for name in NAMES[kind]}
    assert found == dict.fromkeys(NAMES[kind], kind)


def test_short_bf16_products_are_counted_as_adapter_products():
    kinds = [
        gpu_trace.kind_of(event(name, 0, 40), adapters_below_us=139)
        for name in (BF16_PRODUCT, FP8_PRODUCT, SUM)
    ]
    assert kinds == ["adapter_products", "products", "elementwise"]
    assert gpu_trace.kind_of(event(BF16_PRODUCT, 0, 170), adapters_below_us=139) == "products"


def test_the_trace_of_a_step_is_summarised(tmp_path):
    def entry(category: str, name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur}

    entries = [
        entry("kernel", SUM, 1900, 100),  # after the last product, so of the optimizer
        entry("cuda_runtime", "cudaLaunchKernel", 990, 5),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": 990},
        entry("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1000, 10),
        entry("kernel", SUM, 1050, 50),
        entry("kernel", BF16_PRODUCT, 1100, 200),
        entry("kernel", ATTENTION, 1200, 300),  # 100 µs of it overlap the product
        entry("kernel", BF16_PRODUCT, 1600, 20),
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"schemaVersion": 1, "traceEvents": entries}))
    found = gpu_trace.summary(gpu_trace.read(trace), adapters_below_us=139)
    assert found["kernels"] == 5
    assert found["copies_and_fills"] == 1
    assert found["attention_backend"] == "cuDNN"
    assert found["busy_ms"] == pytest.approx(0.58)
    assert found["gaps_ms"] == pytest.approx(0.42)
    milliseconds = {
        "products": 0.2,
        "adapter_products": 0.02,
        "attention": 0.3,
        "elementwise": 0.05,
    }
    assert found["ms_by_kind"] == milliseconds | {"optimizer": 0.1, "copies_and_fills": 0.01}
    assert found["kernels_by_kind"] == {
        "products": 1,
        "adapter_products": 1,
        "attention": 1,
        "elementwise": 1,
        "optimizer": 1,
    }
    assert found["largest"][0] == {"name": ATTENTION, "kind": "attention", "count": 1, "ms": 0.3}


def test_a_trace_without_kernels_has_an_empty_summary():
    found = gpu_trace.summary([])
    assert (found["kernels"], found["busy_ms"], found["attention_backend"]) == (0, 0, None)


def test_fp8_attention_is_reported():
    in_fp8 = event(
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f8_knob_16_64x128x128", 0, 1
    )
    assert gpu_trace.attention_backend([in_fp8]) == "cuDNN, FP8"


def test_clock_and_power_are_medians_over_the_measured_steps():
    sensors = gpu_machine.Sensors()
    for when, line in (
        (1, "345, 70.0\n"),
        (2, "1755, 690.5\n"),
        (3, "1785, 700.5\n"),
        (4, "[N/A], [N/A]\n"),
        (5, "1770, 695.0\n"),
    ):
        sensors.note(when, line)
    assert sensors.between(2, 5) == {"sm_clock_mhz": 1770, "power_w": 695.0}
    assert sensors.between(6, 7) == {"sm_clock_mhz": None, "power_w": None}
    sensors.close()


def test_the_commit_is_read_from_a_file_a_checkout_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "commit"
    file.write_text(json.dumps({"commit": "abc", "clean": True}))
    monkeypatch.setattr(gpu_machine, "ROOT", tmp_path)  # a folder that is not a git checkout
    monkeypatch.setenv("GIT_COMMIT", "def")
    assert gpu_machine.commit_here(file) == {"commit": "abc", "clean": True}
    assert gpu_machine.commit_here() == {"commit": "def", "clean": None}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*git, "add", "commit"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "first"], cwd=tmp_path, check=True)
    checkout = gpu_machine.commit_here()
    assert len(checkout["commit"]) == 40
    assert checkout["clean"]
    # The file takes precedence: a copied tree may be in a repository with another history.
    assert gpu_machine.commit_here(file) == {"commit": "abc", "clean": True}
    file.write_text("changed")
    assert gpu_machine.commit_here() == checkout | {"clean": False}


@pytest.mark.parametrize("parts", [gpu_lora.parts(), gpu_full.parts()], ids=["lora", "full"])
def test_every_part_has_a_valid_config(parts):
    from retemper.pipeline.config.compose import load_config

    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        required = [
            "study=bench",
            "name=gpu",
            "data.path=a",
            "data.tokenizer=b",
            "data.source.path=c",
            "data.seq_length=4096",
        ]
        config = load_config(
            [*required, *part.asked, "schedule.warmup_tokens=0", f"train.tokens={8 * 16 * 4096}"]
        )
        assert config.model.hidden_size == 4096
        assert config.model.num_layers == 32


@pytest.fixture(scope="module")
def corpora(workspace, tmp_path_factory) -> Path:
    """Return a folder with the workspace's corpora under the names that `bench_gpu.py` gives them.

    The corpus of documents is missing on purpose.
    """
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "tokenizer").symlink_to(workspace / "data" / "tokenizer")
    for name in ("long", "short"):
        (folder / name).symlink_to(workspace / "data" / "code")
    return folder


def run_script(name: str, corpora: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH / name), str(corpora), "--tiny", "--seconds", "100"]
    command += ["--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)


def test_a_part_is_measured_after_another_has_failed(corpora, tmp_path):
    out = tmp_path / "gpu-lora.json"
    names = ["lora-nemo", "lora-bf16-plain-eager"]
    result = run_script("gpu_lora.py", corpora, out, "--parts", *names, "--set", "seed=3")
    assert result.returncode == 0, result.stderr
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == names
    assert "documents" in parts["lora-nemo"]["error"]
    part = parts["lora-bf16-plain-eager"]
    assert part["tokens_per_second"] > 0, part
    assert len(part["losses"]) == 3
    assert len(part["step_ms_of_each"]) == 1
    assert part["trace"]["kernels"] == 0
    assert part["machine"]["torch"]
    assert part["commit"]
    assert "seed=3" in part["asked"]
    table = gpu_table.speed_table(parts)
    assert "| lora-bf16-plain-eager | 1 |" in table
    assert "lora-nemo" not in table


@pytest.mark.slow
def test_a_part_that_times_out_is_recorded_and_the_next_one_runs(corpora, tmp_path):
    out = tmp_path / "gpu-full.json"
    names = ["full-bf16-eager", "full-bf16-graph"]
    limits = ["--part-seconds", "0.01", "--trace", "no"]
    run_script("gpu_full.py", corpora, out, "--parts", *names, *limits)
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == names
    assert all("Timeout" in part["error"] for part in parts.values())


@pytest.mark.slow
def test_correctness_checks_run_tests_and_loss_curves(corpora, tmp_path):
    out = tmp_path / "gpu-correct.json"
    selection = "tests/unit/test_flops.py"
    names = [f"tests {selection}", "curve-bf16", "first-fp32"]
    result = run_script("gpu_correct.py", corpora, out, "--tests", selection, "--parts", *names)
    parts = json.loads(out.read_text())["parts"]
    assert parts[names[0]]["passed"], result.stdout
    assert len(parts["curve-bf16"]["losses"]) == 40, result.stdout
    assert [len(variant["losses"]) for variant in parts["first-fp32"]["variants"].values()] == [
        20
    ] * 6
    assert len(parts["compared"]) == 4
    assert max(parts["compared"].values()) < 1e-3


def test_curves_are_compared_by_their_means_and_first_steps_one_by_one():
    constant = [2.0] * 40
    with_spike = [2.0] * 20 + [2.2] + [2.0] * 19
    parts = {
        "curve-bf16": {"losses": constant},
        "curve-bf16-order2": {"losses": [2.02] * 40},
        "curve-fp8_tensorwise": {"losses": with_spike},
        "curve-fp8_delayed": {"error": "out of memory"},
        "first-bf16": {
            "variants": {
                "full-graph": {"losses": [2.0, 2.002]},
                "full-eager": {"losses": [2.0, 2.0]},
            }
        },
    }
    compared = gpu_correct.compare(parts)
    assert compared["curve-fp8_tensorwise"] == pytest.approx(0.2 / 20 / 2)
    assert compared["spread of bf16 over orders of the data"] == pytest.approx(0.02 / 2.02)
    assert compared["first-bf16: full-graph against full-eager"] == pytest.approx(0.001)
    assert "curve-fp8_delayed" not in compared


def test_options_are_removed_from_a_command_with_their_values():
    command = ["gpu_lora.py", "corpora", "--parts", "a", "b", "--seconds=60", "--tiny", "--out=c"]
    assert gpu_parts._without(command, "--parts", "--seconds") == [
        "gpu_lora.py",
        "corpora",
        "--tiny",
        "--out=c",
    ]
