"""Steps that must not count: a loss or gradient norm that is not finite, or leaps out of those before it."""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.distributed.collectives import barrier, from_rank_zero
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.jsonl import append_line, read_lines
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config

_WINDOW = 100  # steps whose mean and deviation the next one is held against
_ENOUGH = 20  # of them at least


@dataclass(frozen=True)
class Anomaly:
    """What was seen of a step that changed no weight."""

    step: int
    what: str


class Unlabelled:
    """Follows steps without a labelled token: over an epoch they are no accident, and the run ends."""

    def __init__(self, config: Config, epochs: Callable[[int], dict[str, float]], samples: int):
        """samples: consumed so far; epochs: stream -> how often it was read after so many samples."""
        self._config = config
        self._epochs = epochs
        self._labelled_until = samples

    def check(self, step: int, samples: int, *, has_loss: bool) -> None:
        """Take note of a step, after which `samples` are consumed. Every rank calls it.

        Raises UserError where every stream was read once, or more, since the last labelled token.
        """
        if has_loss:
            self._labelled_until = samples
            return
        before = self._epochs(self._labelled_until)
        after = self._epochs(samples)
        if any(after[stream] - before[stream] < 1 for stream in after):
            return
        skips = self._config.data.bad_shards == "skip"
        left_out = ", or left out with one of the bad shards named above" if skips else ""
        raise UserError(
            f"step {step}: an epoch of the data ({', '.join(after)}) has passed without one labelled "
            f"token: all of it is prompt or padding{left_out}. There is no loss, and nothing is learned. "
            f"`retemper data show` with this run's keys and step={step} shows the samples; tokenize text "
            "to learn from, and begin a run with it under another name"
        )


def anomaly_in(config: Config, state: TrainState, name: str, value: float) -> Anomaly | None:
    """Whether a loss or gradient norm of the step after `state` is one. The same on every rank, as the value is."""
    recent = getattr(state, f"recent_{name}")
    deviations = config.anomaly.spike_deviations
    label = {"losses": "loss", "grad_norms": "gradient norm"}[name]
    if not math.isfinite(value):
        return Anomaly(state.step + 1, f"the {label} is {value}")
    if deviations and len(recent) >= _ENOUGH:
        mean = statistics.fmean(recent)
        deviation = statistics.pstdev(recent)
        if value > mean + deviations * deviation:
            away = (value - mean) / deviation if deviation else math.inf
            return Anomaly(
                state.step + 1,
                f"the {label} is {value:.4g}, {away:.1f} deviations above the mean {mean:.4g} of the last {len(recent)} steps",
            )
    return None


def remember(state: TrainState, loss: float, grad_norm: float) -> None:
    """Let a good step count among those that the next is held against."""
    for recent, value in ((state.recent_losses, loss), (state.recent_grad_norms, grad_norm)):
        recent.append(value)
        del recent[:-_WINDOW]


def left_out(config: Config) -> set[int]:
    """The steps whose batches change no weight: those of rollbacks before. Every rank calls it."""
    return set(
        from_rank_zero(
            [record["step"] for record in read_lines(config.run_dir / run_folder.LEFT_OUT)]
        )
    )


def roll_back(config: Config, topology: Topology, anomaly: Anomaly) -> None:
    """Record which batches are left out from now on; training then begins anew from the newest checkpoint. Every rank calls it.

    Raises UserError where the run is to stop instead.
    """
    path = config.run_dir / run_folder.LEFT_OUT
    advice = f"step {anomaly.step}: {anomaly.what}. It changed no weight, and the checkpoints in {config.run_dir} are from before it. "
    if config.anomaly.policy == "stop":
        raise UserError(
            f"{advice}anomaly.policy=rollback goes on from the newest and leaves the batch out; a lower optimizer.lr under another name begins anew"
        )
    if len({record["rollback"] for record in read_lines(path)}) >= config.anomaly.max_rollbacks:
        raise UserError(
            f"{advice}{path} has anomaly.max_rollbacks={config.anomaly.max_rollbacks} rollbacks already: what is wrong is not one batch"
        )
    barrier()  # every rank has read the file
    if topology.rank == 0:
        for step in range(
            max(1, anomaly.step - config.anomaly.left_out_steps + 1), anomaly.step + 1
        ):
            append_line(path, {"step": step, "rollback": anomaly.step, "what": anomaly.what})
        print(
            f"{config.study}/{config.name}: {anomaly.what} at step {anomaly.step}; back to the newest checkpoint, without that batch",
            flush=True,
        )
    barrier()
    gc.collect()  # the model before goes before the next one comes
