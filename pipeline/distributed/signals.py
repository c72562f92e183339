"""Signal handling of a rank: signals from the terminal, the launcher and the scheduler."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

from retemper.pipeline.distributed.topology import (
    is_main_process,
    launched_world_size,
    local_device,
)

_stop_signal_received = False
_STOPPING = b"\nstopping: a checkpoint is saved after this step; Ctrl-C again leaves at once\n"


def die_with_launcher() -> None:
    """End this rank at once on Ctrl-C, except in training, and when its torchrun agent dies.

    An orphaned rank would continue to write into the run's folder.
    """
    # Commits are atomic, so there is nothing to clean up.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if launched_world_size() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def stop_signals() -> list[signal.Signals]:
    """Return the signals by which terminals, launchers and schedulers stop a process.

    SIGHUP, at the end of a terminal, is none under nohup, which ignores it.
    """
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    always = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    return [*always, signal.SIGHUP] if hangs_up else always


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[None]:
    """Record signals to stop within the context instead of ending the process.

    `stop_requested` reports them. A second Ctrl-C ends the process at once.
    """
    received: list[int] = []

    def record(number: int, _frame: object) -> None:
        global _stop_signal_received
        _stop_signal_received = True
        if number == signal.SIGINT in received:
            os._exit(130)
        if not received and is_main_process():
            os.write(2, _STOPPING)  # print may have been interrupted
        received.append(number)

    previous_handlers = {number: signal.signal(number, record) for number in stop_signals()}
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
