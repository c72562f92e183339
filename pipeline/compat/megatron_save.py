"""megatron-core's checkpoint writer, kept in this process."""

import queue


def patch() -> None:
    """Give megatron-core's writer a plain queue for its results.

    Its own belongs to a freshly spawned process, which imports torch again: 10 s a save. A
    synchronous save stays in this process, where a plain queue does.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
