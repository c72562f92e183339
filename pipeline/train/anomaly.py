"""Detect and handle anomalous steps.

A step is anomalous when its loss or gradient norm is not finite, or lies far above those of recent
steps.
"""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.distributed.collectives import barrier, broadcast_from_rank0
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.jsonl import append_line
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config

_WINDOW = 100  # recent steps over which mean and standard deviation are taken
_MIN_HISTORY = 20  # recent steps needed before a spike can be detected


@dataclass(frozen=True)
class Anomaly:
    """An anomalous step and the reason; the step has changed no weight."""

    step: int
    reason: str


class Unlabelled:
    """The guard against data without labels.

    Single steps without a labelled token are tolerated; a whole epoch of them ends the run.
    """

    def __init__(self, config: Config, epochs: Callable[[int], dict[str, float]], samples: int):
        """Start counting at the current data position.

        Args:
            config: of the run.
            epochs: maps a number of consumed samples to {stream: number of epochs read}.
            samples: consumed so far.
        """
        self._config = config
        self._epochs = epochs
        self._labelled_until = samples

    def check(self, step: int, samples: int, *, has_loss: bool) -> None:
        """Record whether a step had a loss.

        Args:
            step: the step just done.
            samples: consumed after that step.
            has_loss: whether its global batch had a labelled token.

        Raises:
            UserError: every stream was read at least once since the last labelled token.

        Collective: every rank must call this.
        """
        if has_loss:
            self._labelled_until = samples
            return
        before = self._epochs(self._labelled_until)
        after = self._epochs(samples)
        if any(after[stream] - before[stream] < 1 for stream in after):
            return
        skips = self._config.data.bad_shards == "skip"
        skipped = ", or was skipped with one of the bad shards named above" if skips else ""
        raise UserError(
            f"step {step}: an epoch of the data ({', '.join(after)}) has passed without one "
            f"labelled token: all of it is prompt or padding{skipped}. There is no loss to train "
            f"on. `retemper data show {self._config.run_dir} --step {step}` shows the samples; "
            "tokenize text with labelled tokens, and start a run on it under another name"
        )


def anomaly_in(config: Config, state: TrainState, name: str, value: float) -> Anomaly | None:
    """Return an anomaly if the loss or gradient norm of the step after `state` is anomalous.

    The result is the same on every rank if `value` is.

    Args:
        config: of the run.
        state: after the last step that counts.
        name: "losses" or "grad_norms".
        value: the loss or gradient norm of the step in progress.
    """
    recent = getattr(state, f"recent_{name}")
    deviations = config.anomaly.spike_deviations
    label = {"losses": "loss", "grad_norms": "gradient norm"}[name]
    if not math.isfinite(value):
        return Anomaly(state.step + 1, f"the {label} is {value}")
    if deviations and len(recent) >= _MIN_HISTORY:
        mean = statistics.fmean(recent)
        deviation = statistics.pstdev(recent)
        if value > mean + deviations * deviation:
            distance = (value - mean) / deviation if deviation else math.inf
            return Anomaly(
                state.step + 1,
                f"the {label} is {value:.4g}, {distance:.1f} deviations above "
                f"the mean {mean:.4g} of the last {len(recent)} steps",
            )
    return None


def record_step(state: TrainState, loss: float, grad_norm: float) -> None:
    """Add a normal step to the history that later steps are compared with."""
    for recent, value in ((state.recent_losses, loss), (state.recent_grad_norms, grad_norm)):
        recent.append(value)
        del recent[:-_WINDOW]


def skipped_steps(config: Config) -> set[int]:
    """Return the steps whose batches are skipped, as recorded by earlier rollbacks.

    Collective: every rank must call this.
    """
    records = run_folder.read_skipped_batches(config.run_dir)
    return set(broadcast_from_rank0([record["step"] for record in records]))


def roll_back(config: Config, topology: Topology, anomaly: Anomaly) -> None:
    """Record the batches to skip, before training restarts from the newest checkpoint.

    Raises:
        UserError: anomaly.policy=stop, or anomaly.max_rollbacks is reached.

    Collective: every rank must call this.
    """
    path = config.run_dir / run_folder.SKIPPED_BATCHES
    advice = (
        f"step {anomaly.step}: {anomaly.reason}. It changed no weight, "
        f"and the checkpoints in {config.run_dir} are from before it. "
    )
    if config.anomaly.policy == "stop":
        raise UserError(
            f"{advice}Set anomaly.policy=rollback to continue from the newest checkpoint without "
            "this batch, or start a run under another name with a lower optimizer.lr"
        )
    rollbacks = {record["rollback"] for record in run_folder.read_skipped_batches(config.run_dir)}
    if len(rollbacks) >= config.anomaly.max_rollbacks:
        raise UserError(
            f"{advice}{path} already has anomaly.max_rollbacks={config.anomaly.max_rollbacks} "
            "rollbacks: the cause is not a single batch"
        )
    barrier()  # every rank has read the file
    if topology.rank == 0:
        for step in range(max(1, anomaly.step - config.anomaly.skip_batches + 1), anomaly.step + 1):
            append_line(path, {"step": step, "rollback": anomaly.step, "reason": anomaly.reason})
        print(
            f"{config.study}/{config.name}: {anomaly.reason} at step {anomaly.step}; "
            "restarting from the newest checkpoint, skipping that batch",
            flush=True,
        )
    barrier()
    gc.collect()  # free the old model before the next one is built
