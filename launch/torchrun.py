"""Training on several nodes: one torchrun command per node, with a c10d rendezvous."""

import shlex

from retemper.pipeline.estimate.nodes import Layout

TRAIN = "retemper.pipeline.train"
# Signals that the agent forwards to its ranks, which then save a checkpoint and exit; torchrun's
# default list lacks SIGUSR1.
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
HANDLE_SIGNALS = f"--signals-to-handle={','.join(SIGNALS)}"


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
                HANDLE_SIGNALS,
                "-m",
                TRAIN,
                *overrides,
            ]
        )
        for node in range(layout.nodes)
    ]
