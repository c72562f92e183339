"""Test the environment variables of a run on GPUs, and that the user's own values are kept."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from retemper.pipeline.distributed import environment
from retemper.pipeline.schema.model import ParallelConfig

HOPPER = 9
BLACKWELL = 10
ONE_RANK = ParallelConfig()
TENSOR = ParallelConfig(tensor_parallel_size=2)
CONTEXT = ParallelConfig(context_parallel_size=2)
DATA = ParallelConfig(data_parallel_size=2)
PIPELINE = ParallelConfig(pipeline_parallel_size=2)
OVERLAPPED = ParallelConfig(data_parallel_size=2, overlap=True)
OVERLAPPED_STAGES = ParallelConfig(pipeline_parallel_size=2, overlap=True)
OVERLAPPED_PRODUCTS = ParallelConfig(
    tensor_parallel_size=2, sequence_parallel=True, tensor_parallel_overlap=True
)

ALWAYS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}
SEVERAL_RANKS = ALWAYS | {"NCCL_NVLS_ENABLE": "0"}
ORDERED = SEVERAL_RANKS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Unset all the variables before a test, and restore them after it."""
    names = [*ORDERED, *MARGINS, "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"]
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored after the test, whatever sets it
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("parallel", "capability", "values"),
    [
        (ONE_RANK, HOPPER, ALWAYS),
        (DATA, HOPPER, SEVERAL_RANKS),
        (PIPELINE, HOPPER, SEVERAL_RANKS),
        (TENSOR, HOPPER, ORDERED),
        (TENSOR, None, ORDERED),
        (TENSOR, 8, ORDERED),
        (TENSOR, BLACKWELL, SEVERAL_RANKS),
        (CONTEXT, HOPPER, ORDERED),
        (OVERLAPPED, HOPPER, SEVERAL_RANKS | MARGINS),
        (OVERLAPPED_STAGES, HOPPER, SEVERAL_RANKS),
        (OVERLAPPED_PRODUCTS, HOPPER, ORDERED),
    ],
)
def test_the_variables_follow_the_layout(parallel, capability, values):
    table = environment.wanted(parallel, capability)
    assert {name: value for name, (value, _) in table.items()} == values
    assert all(reason for _, reason in table.values())


@pytest.mark.parametrize(
    ("capability", "asked"), [(HOPPER, True), (None, True), (BLACKWELL, False)]
)
def test_attention_in_fp8_has_delayed_scales_on_hopper(capability, asked):
    table = environment.wanted(ONE_RANK, capability, tensorwise_attention=True)
    assert ("NVTE_DPA_FP8_RECIPE" in table) == asked


def test_unset_variables_are_set():
    found = environment.apply(environment.wanted(TENSOR, HOPPER), TENSOR)
    assert {name: os.environ[name] for name in ORDERED} == ORDERED
    assert (found.chosen, found.kept, found.warning) == (ORDERED, {}, None)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in str(found)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_value_set_by_the_user_is_kept_under_either_name(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    found = environment.apply(environment.wanted(ONE_RANK, HOPPER), ONE_RANK)
    assert os.environ[name] == "max_split_size_mb:512"
    assert len(set(os.environ) & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}) == 1
    assert found.chosen == {"NCCL_GRAPH_REGISTER": "0"}
    assert found.kept == {name: "max_split_size_mb:512"}
    assert str(found) == f"NCCL_GRAPH_REGISTER=0, {name}=max_split_size_mb:512 (already set)"
    again = environment.apply(environment.wanted(ONE_RANK, HOPPER), ONE_RANK)
    assert again == found, "a second call gave another result"


@pytest.mark.parametrize(
    ("variable", "value", "parallel", "warned"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", OVERLAPPED_PRODUCTS, True),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", OVERLAPPED_PRODUCTS, False),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", TENSOR, False),  # no overlap is configured
        ("CUDA_LAUNCH_BLOCKING", "1", OVERLAPPED, True),
        ("CUDA_LAUNCH_BLOCKING", "1", OVERLAPPED_PRODUCTS, True),
        ("CUDA_LAUNCH_BLOCKING", "0", OVERLAPPED, False),
        ("CUDA_LAUNCH_BLOCKING", "1", DATA, False),
        ("NCCL_NVLS_ENABLE", "1", OVERLAPPED, False),  # costs memory but prevents nothing
    ],
)
def test_a_value_that_prevents_the_configured_overlap_gives_one_warning(
    monkeypatch, variable, value, parallel, warned
):
    monkeypatch.setenv(variable, value)
    found = environment.apply(environment.wanted(parallel, HOPPER), parallel)
    assert os.environ[variable] == value
    assert (found.warning is not None) == warned
    assert not warned or variable in found.warning


def test_nothing_is_set_without_a_gpu():
    code = """
import os
before = dict(os.environ)
from retemper.pipeline.distributed import environment
from retemper.pipeline.schema.model import ParallelConfig
found = environment.prepare(ParallelConfig(tensor_parallel_size=2))
assert found == environment.in_force() == environment.Environment()
assert dict(os.environ) == before
print("nothing" + str(found))
"""
    assert _output_of(code, CUDA_VISIBLE_DEVICES="") == "nothing"


@pytest.mark.gpu
def test_cuda_starts_with_the_chosen_settings():
    code = """
import torch
from retemper.pipeline.distributed import environment
from retemper.pipeline.schema.model import ParallelConfig
found = environment.prepare(ParallelConfig())
assert not torch.cuda.is_initialized()
assert found.chosen["NCCL_GRAPH_REGISTER"] == "0", found
tensor = torch.zeros(1, device="cuda")
assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
assert environment._compute_capability() == torch.cuda.get_device_capability()[0]
print("read")
"""
    assert _output_of(code) == "read"


def _output_of(code: str, **variables: str) -> str:
    """Return the output of a separate Python process."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
