"""Test what counts as a spike, and the record of rollbacks in a run's folder."""

import math

import pytest
from conftest import overrides

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.files.jsonl import append_line

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core's imports


def seen(workspace, recent: list[float], value: float, *changes: str):
    from retemper.pipeline.train.anomaly import anomaly_in

    return anomaly_in(
        load_config(overrides(workspace, "x", *changes)),
        TrainState(step=len(recent), recent_losses=recent),
        "losses",
        value,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_from_the_first_step_on(workspace, value):
    assert seen(workspace, [], value).step == 1


def test_a_spike_is_measured_in_deviations_of_recent_steps(workspace):
    recent, six = [2.0, 2.2] * 20, "anomaly.spike_deviations=6"  # mean 2.1, deviation 0.1
    assert seen(workspace, recent, 2.69, six) is None and seen(workspace, recent, 0.0, six) is None
    assert (
        "2.71, 6.1 deviations above the mean 2.1 of the last 40 steps"
        in seen(workspace, recent, 2.71, six).reason
    )
    assert seen(workspace, recent, 100.0) is None  # switched off
    assert seen(workspace, recent[:10], 100.0, six) is None  # too few to tell


def test_the_window_forgets(workspace):
    from retemper.pipeline.train.anomaly import record_step

    state = TrainState()
    for step in range(250):
        record_step(state, float(step), 1.0)
    assert (
        state.recent_losses == [float(step) for step in range(150, 250)]
        and len(state.recent_grad_norms) == 100
    )
    assert TrainState.from_dict(state.to_dict()) == state


def test_skipped_batches_of_older_runs_are_read_beside_new_ones(workspace):
    from retemper.pipeline.runs import run_folder

    config = load_config(overrides(workspace, "older"))
    config.run_dir.mkdir(parents=True)
    append_line(config.run_dir / "left_out.jsonl", {"step": 7, "rollback": 7, "what": "nan"})
    append_line(config.run_dir / run_folder.SKIPPED_BATCHES, {"step": 9, "rollback": 9})
    records = run_folder.read_skipped_batches(config.run_dir)
    assert [record["rollback"] for record in records] == [9, 7]
