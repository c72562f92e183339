"""Test that every benchmark runs, at a small size."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, overrides

BENCHMARKS = {
    "bench_data": [],
    "bench_train": [],
    "bench_exchange": [],
    "bench_tokenize": ["--megabytes", "8", "--rounds", "1"],
    "bench_tokenize_memory": ["--megabytes", "1"],
    "style_figures": [],
}


def start(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        env=os.environ | {"RETEMPER_BENCH_TINY": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_benchmark_has_a_test():
    found = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    by_other_tests = {"bench_attention", "bench_gpu"}  # below, and in test_bench_gpu.py
    assert found == BENCHMARKS.keys() - {"style_figures"} | by_other_tests


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs(name, shared_data):
    assert len(start(name, *BENCHMARKS[name]).splitlines()) >= 1


@pytest.mark.slow
def test_the_benchmark_of_attention_runs(workspace):
    run = overrides(workspace, "attention", "parallel=single")
    assert "megatron / fused" in start("bench_attention", *run)
