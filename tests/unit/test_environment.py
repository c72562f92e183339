"""Test the environment of a run on GPUs: its settings, and that the user's own values are kept."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from retemper.pipeline.distributed import environment
from retemper.pipeline.schema.model import ParallelConfig

HOPPER = 9
BLACKWELL = 10
ALONE = ParallelConfig()
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
SEVERAL = ALWAYS | {"NCCL_NVLS_ENABLE": "0"}
ORDERED = SEVERAL | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Unset every variable of the table before a test and after it."""
    names = [*ORDERED, *MARGINS, "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"]
    for name in names:
        monkeypatch.setenv(name, "")  # noted for the end of the test, whatever sets it meanwhile
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("parallel", "capability", "values"),
    [
        (ALONE, HOPPER, ALWAYS),
        (DATA, HOPPER, SEVERAL),
        (PIPELINE, HOPPER, SEVERAL),
        (TENSOR, HOPPER, ORDERED),
        (TENSOR, None, ORDERED),
        (TENSOR, 8, ORDERED),
        (TENSOR, BLACKWELL, SEVERAL),
        (CONTEXT, HOPPER, ORDERED),
        (OVERLAPPED, HOPPER, SEVERAL | MARGINS),
        (OVERLAPPED_STAGES, HOPPER, SEVERAL),
        (OVERLAPPED_PRODUCTS, HOPPER, ORDERED),
    ],
)
def test_the_table_follows_the_layout(parallel, capability, values):
    table = environment.wanted(parallel, capability)
    assert {name: value for name, (value, _) in table.items()} == values
    assert all(why for _, why in table.values())


def test_what_is_not_set_is_set():
    found = environment.apply(environment.wanted(TENSOR, HOPPER), TENSOR)
    assert {name: os.environ[name] for name in ORDERED} == ORDERED
    assert (found.chosen, found.kept, found.warning) == (ORDERED, {}, None)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in str(found)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_person_set_is_kept_under_either_name(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    found = environment.apply(environment.wanted(ALONE, HOPPER), ALONE)
    assert os.environ[name] == "max_split_size_mb:512"
    assert len(set(os.environ) & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}) == 1
    assert found.chosen == {"NCCL_GRAPH_REGISTER": "0"}
    assert found.kept == {name: "max_split_size_mb:512"}
    assert str(found) == f"NCCL_GRAPH_REGISTER=0, {name}=max_split_size_mb:512 (already set)"
    assert environment.apply(environment.wanted(ALONE, HOPPER), ALONE) == found, "a second call"


@pytest.mark.parametrize(
    ("variable", "value", "parallel", "warned"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", OVERLAPPED_PRODUCTS, True),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", OVERLAPPED_PRODUCTS, False),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", TENSOR, False),  # no overlap was asked for
        ("CUDA_LAUNCH_BLOCKING", "1", OVERLAPPED, True),
        ("CUDA_LAUNCH_BLOCKING", "1", OVERLAPPED_PRODUCTS, True),
        ("CUDA_LAUNCH_BLOCKING", "0", OVERLAPPED, False),
        ("CUDA_LAUNCH_BLOCKING", "1", DATA, False),
        ("NCCL_NVLS_ENABLE", "1", OVERLAPPED, False),  # costs memory, forbids nothing
    ],
)
def test_one_warning_where_a_value_forbids_what_was_asked_for(
    monkeypatch, variable, value, parallel, warned
):
    monkeypatch.setenv(variable, value)
    found = environment.apply(environment.wanted(parallel, HOPPER), parallel)
    assert os.environ[variable] == value
    assert (found.warning is not None) == warned
    assert not warned or variable in found.warning


def test_without_a_gpu_nothing_is_set():
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
    assert _said(code, CUDA_VISIBLE_DEVICES="") == "nothing"


@pytest.mark.gpu
def test_cuda_starts_with_what_was_set():
    code = """
import torch
from retemper.pipeline.distributed import environment
from retemper.pipeline.schema.model import ParallelConfig
found = environment.prepare(ParallelConfig())
assert not torch.cuda.is_initialized()
assert found.chosen["NCCL_GRAPH_REGISTER"] == "0", found
held = torch.zeros(1, device="cuda")
assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
assert environment._compute_capability() == torch.cuda.get_device_capability()[0]
print("read")
"""
    assert _said(code) == "read"


def _said(code: str, **variables: str) -> str:
    """Return the output of a separate Python process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
