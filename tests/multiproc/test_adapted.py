"""Test frozen layers and their adapters as one function (model/adapted.py).

The reference computes the same products as separate operations. test_oracle.py compares the
function at every layout with one rank; here both ways are compared on each layout.
"""

import pytest
from conftest import launch, overrides

LORA = ["method=lora", "init_from=unread", "method.lora.rank=4", "method.lora.alpha=8"]
# From rank 64 on each part of the output has a product of its own.
KINDS = {
    "all": [],
    "parts": ["method.lora.targets=[q,v,up]"],
    "wide": ["method.lora.rank=64"],
    "wide-parts": ["method.lora.rank=64", "method.lora.targets=[k,gate,o]"],
    "biased": ["model.qkv_bias=true", "model.num_query_groups=4"],
    "bf16": ["precision=bf16"],
}
LAYOUTS = {
    "tp2": ["parallel=tp2"],
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel=pp2"],
}


def probe(workspace, world_size: int, name: str, *changes: list[str]) -> None:
    asked = [overrides(workspace, "adapted", *LORA, *changed) for changed in changes]
    launch(world_size, [{"probe": name, "overrides": overriding} for overriding in asked], "probes")


def test_one_rank(workspace):
    probe(workspace, 1, "adapted", *KINDS.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(workspace, layout):
    probe(
        workspace,
        2,
        "adapted",
        *([*KINDS[kind], *LAYOUTS[layout]] for kind in ("all", "wide-parts", "biased")),
    )


def test_few_kernels_are_launched(workspace):
    probe(workspace, 1, "launches", [], ["method.lora.kernel=plain"])
