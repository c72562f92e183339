"""How far a run is: all that a restart needs beside weights and optimizer."""

from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """step counts optimizer steps done; consumed_samples fixes the data position; random state follows from step."""

    step: int = 0
    consumed_samples: int = 0
    seconds: float = 0.0  # spent in steps, over all restarts

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainState":
        """Raises ValueError where a field is missing, unknown or negative."""
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"a train state has {[field.name for field in fields(cls)]}, this one {sorted(values)}")
        state = cls(**values)
        if min(state.step, state.consumed_samples, state.seconds) < 0:
            raise ValueError(f"a train state counts from zero: {state}")
        return state
