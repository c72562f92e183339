"""Test AdamW and Lion, sharded by the distributed optimizer.

Every weight must become what a plain optimizer makes of it in one process.
"""

import pytest
from conftest import launch, overrides

OPTIMIZERS = {"adamw": ["optimizer=adamw"], "lion": ["optimizer=lion", "optimizer.lr=1e-3"]}
LAYOUTS = {name: [f"parallel={name}"] for name in ("dp2", "tp2", "pp2")}
PLUS = [
    "method=lora",
    "method.lora.rank=4",
    "method.lora.alpha=32",
    "method.lora.lr_ratio=4",
    "init_from=unread",
]
SLOW = {
    "tp2sp": (2, [*LAYOUTS["tp2"], "parallel.sequence_parallel=true"]),
    "pp2vpp2": (2, [*LAYOUTS["pp2"], "parallel.virtual_pipeline_parallel_size=2"]),
    "dp2pp2": (4, [*LAYOUTS["pp2"], "parallel.data_parallel_size=2"]),
    "dp2tp2-plus": (4, [*LAYOUTS["tp2"], "parallel.data_parallel_size=2", *PLUS]),
    "dp2-bf16": (2, [*LAYOUTS["dp2"], "precision=bf16"]),
}


def probe(workspace, world_size: int, name: str, optimizer: str, *changes: str) -> None:
    asked = [
        "optimizer.weight_decay=0.1",
        "optimizer.clip_grad=0.01",
        "schedule.cooldown_fraction=0",
        "model.num_layers=4",
        "model.qkv_bias=true",
        "model.qk_norm=true",
    ]
    launch(
        world_size,
        [
            {
                "probe": name,
                "overrides": overrides(
                    workspace, "probe", *OPTIMIZERS[optimizer], *asked, *changes
                ),
            }
        ],
        "probes",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_equals_the_plain_optimizer(workspace, optimizer, layout):
    probe(workspace, 2, "trajectory", optimizer, *LAYOUTS[layout])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_of_lora_plus_equals_the_plain_optimizer(workspace, optimizer):
    probe(workspace, 2, "trajectory", optimizer, *PLUS, *LAYOUTS["dp2"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_at_other_layouts_equals_the_plain_optimizer(workspace, optimizer, layout):
    world_size, changes = SLOW[layout]
    probe(workspace, world_size, "trajectory", optimizer, *changes)


def test_norms_of_single_ranks_are_detected(workspace):
    probe(workspace, 2, "norms_of_each_rank", "lion", *LAYOUTS["dp2"])
