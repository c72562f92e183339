"""One rank of a training run.

Started as `torchrun --nproc-per-node 2 -m retemper.pipeline.train run=… key=value …`.
"""

import sys
from functools import partial

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed.exit import exit_now
from retemper.pipeline.distributed.signals import catch_stop_signals
from retemper.pipeline.entry.rank import run_rank


def main(*overrides: str) -> int:
    def work(config, topology, fingerprints):
        from retemper.pipeline.train.branches import train_with_branches

        with catch_stop_signals():
            train_with_branches(config, topology, fingerprints)

    return run_rank(partial(load_config, list(overrides)), work)


# dist_checkpointing may spawn processes, which import this module again.
if __name__ == "__main__":
    exit_now(main(*sys.argv[1:]))
