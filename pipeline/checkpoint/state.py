"""The progress of a run: all that a restart needs besides weights and optimizer."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from retemper.pipeline.checkpoint.commit import META, committed_steps, folder_of, sealed_meta
from retemper.pipeline.errors import UserError


@dataclass
class TrainState:
    """The progress of a run. The random state follows from `step`, and is not stored."""

    step: int = 0  # optimizer steps done
    consumed_samples: int = 0  # determines the data position
    seconds: float = 0.0  # spent in steps, over all restarts
    # Of the last steps; the next step is anomalous if it lies far above them.
    recent_losses: list[float] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)
    # Of every change of the data: step, consumed_samples and difference.
    data_changes: list[dict] = field(default_factory=list)

    @property
    def samples_of_data(self) -> int:
        """The number of samples consumed of the present data, which is the position in it."""
        return self.consumed_samples - self.data_began_at

    @property
    def data_began_at(self) -> int:
        """The number of samples consumed before the last change of the data."""
        return self.data_changes[-1]["consumed_samples"] if self.data_changes else 0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> "TrainState":
        """Return a state from its fields, as they are in meta.json.

        Raises:
            UserError: a field is missing, unknown, of another type or negative.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise UserError(f"a train state has {names}, this one is {values!r}")
        state = cls(**values)
        counts = (state.step, state.consumed_samples, state.seconds)
        if not all(isinstance(count, int | float) and count >= 0 for count in counts):
            raise UserError(f"a train state counts from zero: {state}")
        return state


def newest_state(run_dir: Path) -> TrainState:
    """Return the train state of a run's newest committed checkpoint, or an initial one without it.

    Raises:
        UserError: the checkpoint's meta.json was changed.
    """
    steps = committed_steps(run_dir)
    if not steps:
        return TrainState()
    return state_of(folder_of(run_dir, steps[-1]), sealed_meta(folder_of(run_dir, steps[-1])))


def state_of(folder: Path, meta: dict) -> TrainState:
    """Return the train state in a checkpoint's meta.json.

    Raises:
        UserError: the train state is invalid; the message names the checkpoint.
    """
    try:
        return TrainState.from_dict(meta.get("train_state"))
    except UserError as error:
        raise UserError(
            f"{folder / META} is damaged, or of another version of retemper: {error}"
        ) from None
