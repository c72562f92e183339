"""Training with torchrun: on this machine, or one command per node with a c10d rendezvous."""

import logging
import os
import shlex

from retemper.pipeline.estimate.nodes import Layout

TRAIN = "retemper.pipeline.train"
# Signals that the agent forwards to its ranks, which then save a checkpoint and exit; torchrun's
# default list lacks SIGUSR1.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def run_here(module: str, overrides: list[str], world_size: int) -> int:
    """Run all ranks on this machine, with the torchrun agent in this process.

    Each rank prints its errors itself, so the agent's traceback of a failed rank is not printed.

    Args:
        module: The module that every rank runs, as with `python -m`.
        overrides: Config overrides, `key=value`, the arguments of the module.
        world_size: The number of ranks.

    Returns:
        The exit code of a rank that failed, at least 1; 0 if all ranks succeeded.

    Raises:
        KeyboardInterrupt: The agent received one of the signals that it handles.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    # The loopback address: laptops and containers often cannot resolve their own host name.
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
    """Return the command to run on each node, in the order of the nodes.

    Args:
        overrides: Config overrides, `key=value`, that are passed on to the training command.
        layout: The job name and the numbers of nodes and ranks per node.
        host: The address of the first node, which hosts the rendezvous.
        port: The port of the rendezvous.
    """
    return [
        shlex.join(
            [
                "torchrun",
                f"--nnodes={layout.nodes}",
                f"--nproc-per-node={layout.ranks_per_node}",
                "--rdzv-backend=c10d",
                f"--rdzv-id={layout.job_name}",
                f"--rdzv-endpoint={host}:{port}",
                # The node that the endpoint names must host the rendezvous store, whatever that
                # node's own host name is.
                f"--rdzv-conf=is_host={int(node == 0)}",
                SIGNALS,
                "-m",
                TRAIN,
                *overrides,
            ]
        )
        for node in range(layout.nodes)
    ]
