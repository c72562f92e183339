"""How far a run is: all that a restart needs beside weights and optimizer."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from retemper.pipeline.checkpoint.commit import META, committed_steps, folder_of, sealed_meta
from retemper.pipeline.errors import UserError


@dataclass
class TrainState:
    """step counts optimizer steps done; consumed_samples fixes the data position; random state follows from step."""

    step: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0  # spent in steps, over all restarts
    recent_losses: list[float] = field(
        default_factory=list
    )  # of the last steps: what the next one may not leap out of
    recent_grad_norms: list[float] = field(default_factory=list)
    data_changes: list[dict] = field(
        default_factory=list
    )  # step, consumed_samples and difference of every switch of the data

    @property
    def samples_of_data(self) -> int:
        """Samples consumed of the present data: its position."""
        return self.consumed_samples - self.data_began_at

    @property
    def data_began_at(self) -> int:
        """Samples consumed before the present data came in."""
        return self.data_changes[-1]["consumed_samples"] if self.data_changes else 0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainState":
        """Raises UserError where a field is missing, unknown, of another type or negative."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise UserError(f"a train state has {names}, this one is {values!r}")
        state = cls(**values)
        counts = (state.step, state.consumed_samples, state.seconds)
        if not all(isinstance(count, int | float) and count >= 0 for count in counts):
            raise UserError(f"a train state counts from zero: {state}")
        return state


def newest_state(run_dir: Path) -> TrainState:
    """Of a run's newest committed checkpoint; at the start without one. Raises UserError where its
    meta.json was changed.
    """
    steps = committed_steps(run_dir)
    if not steps:
        return TrainState()
    return state_of(folder_of(run_dir, steps[-1]), sealed_meta(folder_of(run_dir, steps[-1])))


def state_of(folder: Path, meta: dict) -> TrainState:
    """The train state in a checkpoint's meta.json. Raises UserError that names the checkpoint."""
    try:
        return TrainState.from_dict(meta.get("train_state"))
    except UserError as error:
        raise UserError(
            f"{folder / META} is damaged, or of another version of retemper: {error}"
        ) from None
