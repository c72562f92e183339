"""Imports of libraries without those parts of them that take time and are not used."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def megatron_without_wandb() -> Iterator[None]:
    """Import megatron-core, at the end of the context at the latest, as if wandb were not there.

    Its timers import wandb for a log of their own, which takes a second of every rank. The one rank
    that records to W&B imports it itself (runs/track.py).
    """
    with _hidden("wandb"):
        yield
        importlib.import_module("megatron.core.timers")


def optimizers_without_dynamo() -> None:
    """Keep torch's optimizers from importing its compiler, which takes a second of every rank.

    On first use of a method they import it to exclude that method from compilation. Only for
    processes that compile nothing, as on a CPU.
    """
    import torch

    for member in vars(torch.optim.Optimizer).values():
        method = getattr(member, "__wrapped__", None)
        if method is not None and getattr(member, "__module__", "") == "torch.optim.optimizer":
            method.__dynamo_disable = method


def import_wandb() -> ModuleType:
    """Import wandb, whose runs then do not look for inputs of W&B Launch.

    That imports all of Launch, which takes a second and a half. W&B Launch starts programs on
    clusters, which this project does by itself.
    """
    import wandb
    from wandb.sdk.wandb_run import Run

    Run._detect_and_apply_job_inputs = lambda _run: None
    return wandb


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
