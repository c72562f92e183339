"""Test the detection of loss spikes, and the record of rollbacks in a run's folder."""

import math

import pytest
from conftest import overrides

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.files.jsonl import append_line

pytestmark = pytest.mark.filterwarnings("ignore")  # of megatron-core's imports


def detected_anomaly(workspace, recent: list[float], value: float, *changes: str):
    from retemper.pipeline.train.anomaly import anomaly_in

    return anomaly_in(
        load_config(overrides(workspace, "x", *changes)),
        TrainState(step=len(recent), recent_losses=recent),
        "losses",
        value,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_an_anomaly_from_the_first_step_on(workspace, value):
    assert detected_anomaly(workspace, [], value).step == 1


def test_spike_is_measured_in_standard_deviations_of_recent_steps(workspace):
    recent = [2.0, 2.2] * 20  # mean 2.1, standard deviation 0.1
    six = "anomaly.spike_deviations=6"
    assert detected_anomaly(workspace, recent, 2.69, six) is None
    assert detected_anomaly(workspace, recent, 0.0, six) is None
    assert (
        "2.71, 6.1 deviations above the mean 2.1 of the last 40 steps"
        in detected_anomaly(workspace, recent, 2.71, six).reason
    )
    assert detected_anomaly(workspace, recent, 100.0) is None  # the detection is off by default
    # Ten steps are too few to estimate a deviation.
    assert detected_anomaly(workspace, recent[:10], 100.0, six) is None


def test_only_the_last_hundred_steps_are_kept(workspace):
    from retemper.pipeline.train.anomaly import record_step

    state = TrainState()
    for step in range(250):
        record_step(state, float(step), 1.0)
    assert state.recent_losses == [float(step) for step in range(150, 250)]
    assert len(state.recent_grad_norms) == 100
    assert TrainState.from_dict(state.to_dict()) == state


def test_skipped_batches_of_older_and_newer_versions_are_read(workspace):
    from retemper.pipeline.runs import run_folder

    config = load_config(overrides(workspace, "older"))
    config.run_dir.mkdir(parents=True)
    append_line(config.run_dir / "left_out.jsonl", {"step": 7, "rollback": 7, "what": "nan"})
    append_line(config.run_dir / run_folder.SKIPPED_BATCHES, {"step": 9, "rollback": 9})
    records = run_folder.read_skipped_batches(config.run_dir)
    assert [record["rollback"] for record in records] == [9, 7]
