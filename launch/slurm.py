"""The sbatch script of a training run: one torchrun agent per node."""

import shlex

from retemper.launch.torchrun import HANDLE_SIGNALS, TRAIN
from retemper.pipeline.estimate.nodes import Layout

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={job_name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks_per_node}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
# sed reads to the end: head would break the pipe of scontrol, which pipefail treats as a failure.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

# The same command after a requeue continues from the newest committed checkpoint. The restart count
# separates the rendezvous of one attempt from that of the next.
srun --kill-on-bad-exit=1 bash -c '
    is_host=$([ "$SLURM_NODEID" = 0 ] && echo 1 || echo 0)
    exec torchrun \\
        --nnodes={nodes} \\
        --nproc-per-node={ranks_per_node} \\
        --rdzv-backend=c10d \\
        --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" \\
        --rdzv-endpoint="$0:{port}" \\
        --rdzv-conf="is_host=$is_host" \\
        {signals} \\
        -m {module} "$@"
' "$head_node" {overrides}
"""


def sbatch_script(overrides: list[str], layout: Layout, port: int) -> str:
    """Return the script to submit with sbatch.

    Args:
        overrides: Config overrides, `key=value`, that are passed on to the training command.
        layout: The job name and the numbers of nodes and ranks per node.
        port: The port of the rendezvous on the first node.
    """
    return _SCRIPT.format(
        job_name=layout.job_name,
        nodes=layout.nodes,
        ranks_per_node=layout.ranks_per_node,
        port=port,
        module=TRAIN,
        signals=HANDLE_SIGNALS,
        overrides=shlex.join(overrides),
    )
