"""Signals to a rank: from its terminal, its launcher and the cluster's scheduler."""

import contextlib
import ctypes
import os
import signal
import sys

from retemper.pipeline.distributed.topology import launched_world_size, local_device

_asked_to_stop = False


def follow_launcher() -> None:
    """End this rank at once on Ctrl-C, and when its torchrun agent dies: an orphan would go on writing into the run's folder."""
    signal.signal(
        signal.SIGINT, lambda *_: os._exit(130)
    )  # commits are atomic: there is nothing to unwind
    if launched_world_size() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def noting_signals():
    """Within it SIGTERM and SIGUSR1, which schedulers send before they end a job, end nothing: asked_to_stop tells of them."""

    def note(*_signal) -> None:
        global _asked_to_stop
        _asked_to_stop = True

    before = {asks: signal.signal(asks, note) for asks in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for asks, handler in before.items():
            signal.signal(asks, handler)


def asked_to_stop() -> bool:
    """Whether any rank has had a signal to stop. Every rank calls it."""
    import torch

    asked = torch.tensor(int(_asked_to_stop), device=local_device(torch))
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked)
