"""All ranks of a job on this machine, with torch's elastic agent in this process.

Each rank prints its errors itself, so the agent's traceback of a failed rank is not printed.
"""

import gc
import importlib
import logging
import os
import signal
import sys

from retemper.launch.torchrun import HANDLE_SIGNALS, SIGNALS
from retemper.pipeline.distributed import topology
from retemper.pipeline.distributed.exit import exit_now


def run_here(module: str, arguments: list[str], world_size: int) -> int:
    """Run all ranks on this machine.

    Args:
        module: The package whose `__main__.main(arguments)` every rank runs.
        arguments: Its arguments, such as config overrides `key=value`.
        world_size: The number of ranks.

    Returns:
        The exit code of a rank that failed, at least 1; 0 if all ranks succeeded.

    Raises:
        KeyboardInterrupt: The agent received one of the signals that it handles.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    start = _fork if _can_fork() else _start
    try:
        start(module, arguments, world_size)
    except ChildFailedError as error:
        return max(1, next(iter(error.failures.values())).exitcode)
    except SignalException:
        raise KeyboardInterrupt from None
    return 0


def _can_fork() -> bool:
    """Return whether ranks may be forked.

    CUDA cannot be used in a process that was forked after its start, and other systems than Linux
    have libraries that threads make unsafe to fork.
    """
    import torch

    return sys.platform == "linux" and not torch.cuda.device_count()


def _start(module: str, arguments: list[str], world_size: int) -> None:
    """Start each rank as a new process, `python -m module arguments`."""
    from torch.distributed import run

    # The loopback address: laptops and containers often cannot resolve their own host name.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    _silence_agent()
    command = [HANDLE_SIGNALS, f"--nproc-per-node={world_size}", "-m", module, *arguments]
    run.run(run.parse_args([*rendezvous, *command]))


def _fork(module: str, arguments: list[str], world_size: int) -> None:
    """Fork each rank from this process, which imports once what all of them need."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    topology.prepare_megatron()
    importlib.import_module(f"{module}.__main__")
    _silence_agent()  # the preparation set another level
    gc.freeze()  # a collection in a rank would copy the pages of all imported objects
    sys.stdout.flush()
    sys.stderr.flush()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id="local",
        max_restarts=0,
        start_method="fork",
        signals_to_handle=",".join(SIGNALS),
    )
    elastic_launch(config, _forked_rank)(module, arguments)


def _silence_agent() -> None:
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)


def _forked_rank(module: str, arguments: list[str]) -> None:
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # the agent's handlers were inherited
    code = importlib.import_module(f"{module}.__main__").main(*arguments)
    if code:
        exit_now(code)
