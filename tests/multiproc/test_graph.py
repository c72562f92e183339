"""Test recorded passes (model/graph.py) on CPU, where a function stands in for the graph.

They must be equal bit for bit to passes without a graph.
"""

import pytest
from conftest import launch, overrides

from retemper.pipeline.runs import eval_folder, run_folder

LORA = ["method=lora", "method.lora.rank=4", "optimizer.lr=1e-3"]
METHODS = {"full": [], "lora": LORA, "dropout": [*LORA, "method.lora.dropout=0.1"]}
# Micro-batches: four a step on one rank.
SMALL = [
    "train.micro_batch_size=2",
    "checkpoint.save_every_steps=5",
    "checkpoint.milestones=[2048]",
]


@pytest.fixture(scope="module")
def runs(workspace):
    """Train each method without a graph, with one, and with one recorded again after a restart."""

    def case(name, *changes, **how):
        base = [] if name == "base" else [f"init_from={workspace / 'runs' / 'graph' / 'base'}"]
        asked = overrides(workspace, name, *SMALL, "study=graph", *base, *changes)
        return {"overrides": asked} | how

    cases = [case("base", "train.cuda_graph=off")]
    on = "train.cuda_graph=on"
    for method, changes in METHODS.items():
        cases.append(case(f"{method}-off", *changes, "train.cuda_graph=off"))
        cases.append(case(f"{method}-on", *changes, on, graph=True))
        cases.append(case(f"{method}-cut", *changes, on, graph=True, stop_after=7))
        cases.append(case(f"{method}-cut", *changes, on, graph=True))
    branches = ["train.branches=[2560]", "init_from=null"]
    cases.append(case("branched-off", *branches, "train.cuda_graph=off"))
    cases.append(case("branched-on", *branches, on, graph=True))
    launch(1, cases)
    return workspace / "runs" / "graph"


def records(run) -> list[dict]:
    """Return the metrics of a run's training, without its speed."""
    measured = ("loss", "grad_norm", "lr")
    return [{key: record[key] for key in measured} for record in run_folder.read_metrics(run)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["on", "cut"])
def test_recorded_passes_equal_plain_ones_bit_for_bit(runs, method, how):
    expected = records(runs / f"{method}-off")
    assert len(expected) == 10
    assert records(runs / f"{method}-{how}") == expected
    scores = eval_folder.read_scores(runs / f"{method}-off")
    assert len(scores) > 1 and eval_folder.read_scores(runs / f"{method}-{how}") == scores


def test_each_branch_records_its_own_graph(runs):
    for name in ("branched-{}", "branched-{}-2560"):
        assert records(runs / name.format("on")) == records(runs / name.format("off"))
