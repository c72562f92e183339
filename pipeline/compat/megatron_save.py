"""A megatron-core checkpoint writer that stays in this process."""

import queue


def patch() -> None:
    """Replace the result queue of megatron-core's writer by a plain one.

    The original queue belongs to a freshly spawned process, which imports torch again: 10 s per
    save. A synchronous save stays in this process, where a plain queue works.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
