"""Signal handling of a rank: signals from the terminal, the launcher and the scheduler."""

import contextlib
import ctypes
import os
import signal
import sys

from retemper.pipeline.distributed.topology import launched_world_size, local_device

_stop_signal_received = False


def die_with_launcher() -> None:
    """End this rank at once on Ctrl-C and when its torchrun agent dies.

    An orphaned rank would continue to write into the run's folder.
    """
    # Commits are atomic, so there is nothing to clean up.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if launched_world_size() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def catch_stop_signals():
    """Record SIGTERM and SIGUSR1 within the context instead of ending the process.

    Schedulers send these signals before they end a job; `stop_requested` reports them.
    """

    def record(*_signal) -> None:
        global _stop_signal_received
        _stop_signal_received = True

    previous_handlers = {
        number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Return whether any rank has received a signal to stop.

    Collective: every rank must call this.
    """
    import torch

    stop = torch.tensor(int(_stop_signal_received), device=local_device(torch))
    torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
    return bool(stop)
