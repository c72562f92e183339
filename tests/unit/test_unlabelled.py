"""Test steps without a labelled token: they have no loss, and a whole epoch of them ends the run.

The first of them prints a warning, and the detection of spikes ignores all of them.
"""

import itertools
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import overrides

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.order import Order, Stream
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.errors import UserError
from retemper.pipeline.report.figures import training_loss
from retemper.pipeline.report.results import read_study
from retemper.pipeline.runs import run_folder

prepare_megatron()  # before anything imports megatron-core
from retemper.pipeline.train import log as logs  # noqa: E402
from retemper.pipeline.train import step as steps  # noqa: E402
from retemper.pipeline.train.anomaly import Anomaly, Unlabelled  # noqa: E402
from retemper.pipeline.train.step import StepResult, train_step  # noqa: E402

BATCH = 8


def run_step(workspace, state: TrainState, losses, masks, grad_norm: float = 1.0):
    """Run a training step on micro-batches with these losses, of which the masks select some.

    The forward and backward passes are replaced by a mock that returns the sums of the losses.
    """
    sums = [
        {
            "loss": (torch.tensor(loss) * torch.tensor(mask)).sum(),
            "tokens": torch.tensor(mask).sum().int(),
            "by_stream": torch.zeros(0, 2),
        }
        for loss, mask in zip(losses, masks, strict=True)
    ]
    passes = mock.MagicMock(return_value=sums, model=[])
    optimizer = mock.MagicMock(param_groups=[{"lr": 0.1}])
    optimizer.get_grad_norm.return_value = grad_norm
    config = load_config(overrides(workspace, "stepped", "train.log_every_steps=1000"))
    one_rank = mock.patch.object(steps, "all_reduce_from_last_stage", torch.Tensor.tolist)
    with one_rank, mock.patch.object(steps, "clip_grad_by_total_norm_fp32"):
        return train_step(config, state, passes, optimizer, mock.MagicMock(), [])


def test_loss_is_the_mean_over_labelled_tokens_and_none_without_them(workspace):
    state = TrainState()
    result = run_step(workspace, state, [[2.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [0.0, 0.0]])
    assert result.loss == 3.0
    result = run_step(
        workspace, state, [[2.0, 4.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]], grad_norm=0.0
    )
    assert result.loss is None
    assert result.grad_norm == 0.0
    assert (state.recent_losses, state.recent_grad_norms) == ([3.0], [1.0])
    state.recent_losses = [0.0] * 20
    assert run_step(workspace, state, [[0.0]], [[1.0]]).loss == 0.0, "a loss of zero is a loss"


@pytest.mark.parametrize(
    ("losses", "grad_norm"),
    [([[float("nan")]], 0.0), ([[float("inf")]], 0.0), ([[1.0]], float("nan"))],
)
def test_non_finite_loss_or_gradient_is_an_anomaly_also_without_labels(
    workspace, losses, grad_norm
):
    state = TrainState()
    assert isinstance(run_step(workspace, state, losses, [[0.0]], grad_norm), Anomaly)
    assert not state.recent_losses


def check_steps(sizes: dict[str, int], shares: list[int], labelled, *, begin: int = 0) -> int:
    """Run the check after each of 999 steps over these streams, and return the last step.

    Args:
        sizes: stream -> its number of samples.
        shares: The share of each stream in the mixture.
        labelled: step -> whether it had a labelled token.
        begin: The number of samples that were consumed before a restart.

    Raises:
        UserError: a whole epoch had no labelled token.
    """
    order = Order(
        tuple(
            Stream(number, (size,), share)
            for number, (size, share) in enumerate(zip(sizes.values(), shares, strict=True))
        )
    )
    config = SimpleNamespace(run_dir="runs/study/name", data=SimpleNamespace(bad_shards="stop"))
    unlabelled = Unlabelled(
        config, lambda samples: dict(zip(sizes, order.epochs(samples), strict=True)), begin
    )
    for step in range(begin // BATCH + 1, 1000):
        unlabelled.check(step, step * BATCH, has_loss=labelled(step))
    return step


@pytest.mark.parametrize(
    ("sizes", "shares", "labelled", "begin", "last"),
    [
        ({"code": 32}, [1], lambda step: False, 0, 4),
        ({"code": 33}, [1], lambda step: False, 0, 5),
        ({"code": 4}, [1], lambda step: False, 0, 1),  # one batch is two epochs
        ({"code": 32}, [1], lambda step: step <= 10, 0, 14),
        ({"code": 32}, [1], lambda step: step == 3, 0, 7),
        ({"code": 32}, [1], lambda step: False, 16, 6),  # after a restart the count begins at zero
        ({"code": 32, "replay": 8}, [1, 1], lambda step: False, 0, 8),  # the slowest stream counts
        ({"code": 32, "replay": 32}, [3, 1], lambda step: False, 0, 16),
    ],
)
def test_epoch_without_labelled_tokens_ends_the_run(sizes, shares, labelled, begin, last):
    with pytest.raises(
        UserError,
        match=rf"^step {last}: an epoch of the data \({', '.join(sizes)}\) "
        r"has passed without one labelled",
    ):
        check_steps(sizes, shares, labelled, begin=begin)


def test_run_continues_with_a_labelled_step_in_every_epoch():
    assert check_steps({"code": 32}, [1], lambda step: step % 4 == 0) == 999


@pytest.fixture
def log(workspace, tmp_path, capsys):
    """Return a Log of rank 0, whose first lines of output are discarded.

    The test advances its state.
    """
    config = load_config([*overrides(workspace, "logged"), f"runs_dir={tmp_path}"])
    streams = SimpleNamespace(epochs=lambda _samples: {"math": 0.5})
    batches = SimpleNamespace(streams=streams, seconds_waited=0.0)
    with logs.Log(config, TrainState(), batches, (1, 0), enabled=True) as log:
        capsys.readouterr()
        yield log


def test_missing_loss_is_logged_as_absent_and_warned_of_once(log, capsys):
    for number, loss in zip(itertools.count(1), (2.5, None, 0.0, None)):
        log.state.step = number
        log.state.seconds = float(number)
        log.step(StepResult(loss, {}, 0.5, 1e-3, {}))
    output = capsys.readouterr().out
    assert output.count("warning: step 2 has no labelled token") == output.count("warning") == 1
    assert re.findall(r"step +(\d+)  loss (\S+)  grad_norm", output) == [
        ("1", "2.5000"),
        ("2", "-"),
        ("3", "0.0000"),
        ("4", "-"),
    ]
    records = list(run_folder.read_metrics(log.config.run_dir))
    assert [record.get("loss", "absent") for record in records] == [2.5, "absent", 0.0, "absent"]
    assert all(record["grad_norm"] == 0.5 for record in records)


def test_warning_also_comes_from_a_step_that_is_not_logged(log, capsys):
    log.config = log.config.model_copy(
        update={"train": log.config.train.model_copy(update={"log_every_steps": 100})}
    )
    log.state.step = 3
    log.state.seconds = 1.0
    log.step(StepResult(None, {}, 0.0, 1e-3, {}))
    assert "warning: step 3 has no labelled token" in capsys.readouterr().out
    assert not list(run_folder.read_metrics(log.config.run_dir))


def test_report_draws_a_gap_for_a_missing_loss(log, tmp_path):
    for number, loss in enumerate((2.5, None, 2.0), 1):
        log.state.step = number
        log.state.consumed_samples = 8 * number
        log.state.seconds = float(number)
        log.step(StepResult(loss, {}, 0.5, 1e-3, {}))
    [line, *_] = training_loss(read_study(log.config.run_dir.parent)).axes[0].lines
    drawn = line.get_ydata()
    assert drawn[0] == 2.5
    assert math.isnan(drawn[1])
    assert drawn[2] == 2.0
    json.dumps(list(run_folder.read_metrics(log.config.run_dir)), allow_nan=False)
