"""A run as torchrun commands, one per node, meeting at a c10d rendezvous on the first."""

import logging
import os
import shlex

from retemper.pipeline.estimate.nodes import Layout

TRAIN = "retemper.pipeline.train"
# What the agent hands on to its ranks, which save and leave; torchrun's own list is without SIGUSR1.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def run_here(module: str, overrides: list[str], world_size: int) -> int:
    """Run all ranks on this machine, the torchrun agent in this process, and return the exit code.

    What a rank had to say it has said itself: the agent's own traceback of it is left out.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    # The loopback address, not the host name: laptops and containers often cannot resolve their own.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    try:
        run.run(
            run.parse_args(
                [*rendezvous, SIGNALS, f"--nproc-per-node={world_size}", "-m", module, *overrides]
            )
        )
    except ChildFailedError as error:
        return max(1, next(iter(error.failures.values())).exitcode)
    except SignalException:
        raise KeyboardInterrupt from None
    return 0


def node_commands(overrides: list[str], layout: Layout, host: str, port: int) -> list[str]:
    """The command to type on each node."""
    return [
        shlex.join(
            [
                "torchrun",
                f"--nnodes={layout.nodes}",
                f"--nproc-per-node={layout.ranks_per_node}",
                "--rdzv-backend=c10d",
                f"--rdzv-id={layout.job_name}",
                f"--rdzv-endpoint={host}:{port}",
                # The rendezvous store must be hosted by the node that the endpoint names, whatever that node calls itself.
                f"--rdzv-conf=is_host={int(node == 0)}",
                SIGNALS,
                "-m",
                TRAIN,
                *overrides,
            ]
        )
        for node in range(layout.nodes)
    ]
