"""Test milestones as branches of a trunk: each equals the run that is trained straight to it."""

import pytest
import torch
from conftest import launch, overrides
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from retemper.pipeline.checkpoint.commit import committed_steps, folder_of
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.runs import eval_folder, run_folder

STEP = 8 * 64
# Steps of a branch -> its name.
BRANCHES = {3: "trunk-1536", 10: "trunk-5120", 20: "trunk-10240"}
WARMUP = f"schedule.warmup_tokens={4 * STEP}"
TRUNK = [
    f"train.branches=[{','.join(str(steps * STEP) for steps in BRANCHES)}]",
    f"train.tokens={16 * STEP}",
    WARMUP,
]
# A branch by a command of its own, with another rate than its trunk's.
OTHER = [
    f"train.tokens={10 * STEP}",
    WARMUP,
    "optimizer.lr=2e-3",
    "optimizer.weight_decay=0.1",
    "schedule.min_lr_ratio=0.25",
]
OTHER += ["checkpoint.save_every_steps=3"]
METHODS = {"full": [], "lora": ["method=lora", "method.lora.rank=4", "optimizer.lr=1e-3"]}


@pytest.fixture(scope="module")
def base(workspace):
    launch(
        2,
        [
            {
                "overrides": overrides(
                    workspace, "base", "study=branching", f"train.tokens={4 * STEP}", "parallel=tp2"
                )
            }
        ],
    )
    return workspace / "runs" / "branching" / "base"


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def runs(workspace, base, request):
    """Return the folder of the study of a method.

    It has a trunk and its branches, and runs straight to the milestones.
    """
    method = request.param

    def case(name, *changes, **how):
        where = [f"study={method}", f"init_from={base}", "parallel=tp2", *METHODS[method]]
        return {"overrides": overrides(workspace, name, *where, *changes)} | how

    straight = [
        case(f"straight-{steps}", f"train.tokens={steps * STEP}", WARMUP)
        for steps in BRANCHES
        if steps > 4
    ]
    # The second branch is cut off in its cooldown, after the save of its step 9: sixteen steps of
    # the trunk, one of the first branch, one of the second.
    cut_off = case("trunk", *TRUNK, "checkpoint.save_every_steps=3", stop_after=18)
    whole = case("trunk", *TRUNK, "checkpoint.save_every_steps=3")
    launch(
        2,
        [
            *straight,
            cut_off,
            whole,
            case("other", *OTHER, f"branch_of={workspace / 'runs' / method / 'trunk'}"),
        ],
    )
    return workspace / "runs" / method


def curve(run) -> dict[int, tuple[float, ...]]:
    return {
        record["step"]: tuple(record[key] for key in ("loss", "grad_norm", "lr"))
        for record in run_folder.read_metrics(run)
    }


def test_a_branch_equals_an_uninterrupted_run_to_its_milestone(runs):
    for steps in (10, 20):
        straight, branch = curve(runs / f"straight-{steps}"), curve(runs / BRANCHES[steps])
        begins = {10: 8, 20: 16}[steps]
        assert sorted(branch) == list(range(begins + 1, steps + 1))
        assert branch == {step: values for step, values in straight.items() if step > begins}
        scores = eval_folder.read_scores(runs / BRANCHES[steps])
        assert scores == {steps: eval_folder.read_scores(runs / f"straight-{steps}")[steps]}


def test_the_rates_are_the_closed_form_on_trunk_and_branches(runs):
    peak = 1e-3 if runs.name == "lora" else 5e-3

    def rate(step: int, cools_down_at: int | None = None) -> float:
        done = step - 1
        return peak * min(
            1.0,
            done / 4,
            *([] if cools_down_at is None else [(cools_down_at - done) / (0.2 * cools_down_at)]),
        )

    assert [values[2] for values in curve(runs / "trunk").values()] == pytest.approx(
        [rate(step) for step in range(1, 17)], rel=1e-9
    )
    for steps in (10, 20):
        cooled = {step: values[2] for step, values in curve(runs / BRANCHES[steps]).items()}
        assert cooled == pytest.approx({step: rate(step, steps) for step in cooled}, rel=1e-9)
    # Within the warm-up there is no cooldown.
    assert {step: values[2] for step, values in curve(runs / BRANCHES[3]).items()} == pytest.approx(
        {3: rate(3)}, rel=1e-9
    )


def test_the_trunk_keeps_what_its_branches_need(runs, workspace):
    assert {2, 8, 16} <= set(committed_steps(runs / "trunk"))
    config = load_config(overrides(workspace, "trunk", *TRUNK))
    assert config.branch_steps == [2, 8, 16] and config.milestone_steps == [16]


def tensors(run, step: int) -> dict[str, torch.Tensor]:
    """Return the whole weights and optimizer states of a checkpoint."""
    folder = folder_of(run, step)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_a_branch_with_another_rate_differs_only_in_it(runs):
    other, branch = curve(runs / "other"), curve(runs / BRANCHES[10])
    assert other[9][:2] == branch[9][:2]
    # The cooldown's first step is at the peak, its second halfway from there to a quarter of it.
    assert [values[2] for values in other.values()] == pytest.approx(
        [2e-3, 2e-3 * (1 + 0.25) / 2], rel=1e-9
    )
    # After one step of the same gradient Adam's moments are the same, but not the weights.
    found, expected = tensors(runs / "other", 9), tensors(runs / BRANCHES[10], 9)
    moments = [key for key in expected if "exp_avg" in key]
    assert moments and all(found[key].equal(expected[key]) for key in moments)
    assert any(
        not found[key].equal(expected[key]) for key in expected if not key.startswith("optimizer.")
    )
