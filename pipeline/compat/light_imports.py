"""Imports of megatron-core and transformers without what takes time in them and is not used."""

import contextlib
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def megatron_without_wandb() -> Iterator[None]:
    """Import megatron-core, at the end of the context at the latest, as if wandb were not there.

    Its timers import wandb for a log of their own, which takes a second of every rank. The one rank
    that records to W&B imports it itself (runs/track.py).
    """
    with _hidden("wandb"):
        yield
        importlib.import_module("megatron.core.timers")


def import_transformers() -> None:
    """Import what transformers needs to generate text, as if scikit-learn were not there.

    Its assisted decoding imports scikit-learn, which takes three seconds of every process.
    transformers looks for it once, so a process that has imported transformers is left as it is.
    """
    if "transformers" in sys.modules:
        return
    with _hidden("sklearn"):
        importlib.import_module("transformers.generation.candidate_generator")


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make the import of a package fail as if it were not installed, unless it is there already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # documented, but not in typeshed
    try:
        yield
    finally:
        del sys.modules[package]
