"""megatron-core's imports without one that takes time and is not used."""

import contextlib
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_wandb() -> Iterator[None]:
    """Import megatron-core, at the end of the context at the latest, as if wandb were not there.

    Its timers import wandb for a log of their own, which takes a second of every rank. The one rank
    that records to W&B imports it itself (runs/track.py).
    """
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # documented, but not in typeshed
    try:
        yield
        importlib.import_module("megatron.core.timers")
    finally:
        del sys.modules["wandb"]
