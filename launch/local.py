"""All ranks of a job on this machine, with torch's elastic agent in this process.

Each rank prints its errors itself, so the agent's traceback of a failed rank is not printed.
"""

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

from retemper.pipeline.distributed import topology
from retemper.pipeline.distributed.exit import exit_now
from retemper.pipeline.distributed.signals import stop_signals


def run_here(module: str, arguments: list[str], world_size: int) -> int:
    """Run all ranks on this machine.

    On a CPU they are forked from this process, which imports once what all of them need.
    Environment variables of other launches, such as WORLD_SIZE or PET_NNODES, have no effect.

    Args:
        module: The package whose `__main__.main(*arguments)` every rank runs.
        arguments: Its arguments, such as config overrides `key=value`.
        world_size: The number of ranks.

    Returns:
        The exit code of a rank that failed, at least 1; 0 if all ranks succeeded.

    Raises:
        KeyboardInterrupt: The ranks left because of a signal to this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        # The loopback address: laptops and containers often cannot resolve their own host name.
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id="local",
        max_restarts=0,
        start_method="fork",
        # The agent would kill ranks that need longer than 30 s for a save.
        signals_to_handle="SIGQUIT",
    )
    fork = _can_fork()
    if fork:
        _import_for_ranks(module)
    # After those imports, which set another level.
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _stop_signals_forwarded() as received:
        try:
            if fork:
                elastic_launch(config, _forked_rank)(module, arguments)
            else:
                elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except ChildFailedError as error:
            code = next(iter(error.failures.values())).exitcode
            if not received or code == 1:
                return max(1, code)
        except SignalException:
            raise KeyboardInterrupt from None
    if received:
        raise KeyboardInterrupt
    return 0


@contextlib.contextmanager
def _stop_signals_forwarded() -> Iterator[list[int]]:
    """Forward signals to the ranks as SIGTERM, and wait for them; a second Ctrl-C kills them.

    Training ranks save a checkpoint before they leave, others leave at once.

    Yields:
        The signals received so far.
    """
    import psutil

    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        at_once = number == signal.SIGINT in received
        received.append(number)
        for rank in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _can_fork() -> bool:
    """Return whether ranks may be forked.

    CUDA cannot be used in a process that was forked after its start, and other systems than Linux
    have libraries that threads make unsafe to fork.
    """
    import torch

    return sys.platform == "linux" and not torch.cuda.device_count()


def _import_for_ranks(module: str) -> None:
    topology.prepare_megatron()
    importlib.import_module(f"{module}.__main__")
    gc.freeze()  # a collection in a rank would copy the pages of all imported objects
    sys.stdout.flush()
    sys.stderr.flush()


def _forked_rank(module: str, arguments: list[str]) -> None:
    for number in (*stop_signals(), signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's handlers were inherited
    code = importlib.import_module(f"{module}.__main__").main(*arguments)
    if code:
        exit_now(code)
