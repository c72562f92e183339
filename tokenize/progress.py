"""The progress of a job, counted in shared memory by the processes that do the work."""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import SynchronizedArray

# Pool workers are forked from a small server process: a fork of this process would copy the locks
# of its threads.
PROCESSES = multiprocessing.get_context("forkserver")
# These imports take seconds (the writer's needs torch); the server process does them once for all
# workers of all stages.
PROCESSES.set_forkserver_preload(
    [
        "retemper.tokenize.job",
        "retemper.tokenize.mds_writer",
        "gigatoken",
        "awkward",
        "pyarrow.parquet",
    ]
)

type Counters = SynchronizedArray[int]

_counters: Counters | None = None


def shared_counters() -> Counters:
    """Return shared counters of documents and tokens for the workers of one pool."""
    return PROCESSES.Array("q", 2)


def use_counters(counters: Counters | None) -> None:
    """Set the counters that `advance` adds to in this process; None stops the counting."""
    global _counters
    _counters = counters


def advance(*, documents: int, tokens: int) -> None:
    """Add to the counters of this process, if it has any."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += documents
            _counters[1] += tokens


@contextlib.contextmanager
def progress_bar(
    name: str, total: int, counters: Counters, *, show: bool
) -> Iterator[Callable[[], None]]:
    """Show a progress bar of finished tasks, with documents/s and tokens/s while they run.

    Args:
        name: The name of the stage.
        total: The number of its tasks.
        counters: The shared counters of the workers.
        show: Whether to show the bar.

    Yields:
        The function to call when a task is finished.
    """
    from retemper.pipeline.files.progress_bar import ProgressBar

    started = time.monotonic()
    stop = threading.Event()
    with ProgressBar(total=total, desc=name, unit="part", disable=not show) as bar:

        def watch() -> None:
            while not stop.wait(1):
                seconds = time.monotonic() - started
                documents = counters[0]
                tokens = counters[1]
                rates = f"{tokens / seconds:,.0f} tokens/s, {documents / seconds:,.0f} documents/s"
                bar.set_postfix_str(f"{tokens:,} tokens, {rates}" if tokens else "")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar.update
        finally:
            stop.set()
            watcher.join()
