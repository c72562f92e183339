"""Test dropout in the model on real ranks: masks, their mean effect, recomputation, restarts."""

import pytest
from conftest import launch, overrides

from retemper.pipeline.runs import run_folder

DROPOUT = ["dropout.attention=0.3", "dropout.hidden=0.3"]
LAYOUTS = {
    "tp2": ["parallel=tp2"],
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "cp2": ["parallel=cp2"],
    "pp2": ["parallel=pp2"],
}


def probe(workspace, world_size: int, name: str, *changes: list[str]) -> None:
    cases = [
        {"probe": name, "overrides": overrides(workspace, "dropped", *DROPOUT, *changed)}
        for changed in changes
    ]
    launch(world_size, cases, "probes")


def test_masks_agree_where_activations_do(workspace):
    recomputed = ["parallel.recompute=full"]
    layouts = [LAYOUTS["tp2"], LAYOUTS["tp2sp"], LAYOUTS["cp2"], ["parallel=dp2"]]
    layouts += [[*LAYOUTS[name], *recomputed] for name in ("tp2", "tp2sp")]
    probe(workspace, 2, "masks", *layouts)


@pytest.mark.slow
def test_mean_loss_is_that_of_one_rank_at_every_layout(workspace):
    probe(workspace, 1, "mean_loss", [])
    probe(workspace, 2, "mean_loss", *LAYOUTS.values())


def test_recomputation_changes_no_loss(workspace):
    names = {"kept": [], "recomputed": ["parallel.recompute=full"]}
    cases = [
        {"overrides": overrides(workspace, name, *DROPOUT, *LAYOUTS["tp2"], *changes)}
        for name, changes in names.items()
    ]
    launch(2, cases)
    kept, recomputed = (
        [record["loss"] for record in run_folder.read_metrics(workspace / "runs" / "test" / name)]
        for name in names
    )
    assert kept == recomputed
    assert len(kept) == 10
