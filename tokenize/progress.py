"""How far a job is, counted in shared memory by whichever process does the work."""

import contextlib
import multiprocessing
import sys
import threading
import time

# A pool's workers start from a small server process: a fork of this one would copy its threads' locks.
PROCESSES = multiprocessing.get_context("forkserver")
# Seconds of imports (streaming brings torch and transformers), once for all workers of all stages.
PROCESSES.set_forkserver_preload(
    ["retemper.tokenize.job", "streaming", "gigatoken", "awkward", "pyarrow.parquet"]
)

_counters = None


def shared_counters():
    """Documents and tokens so far, for the workers of one pool."""
    return PROCESSES.Array("q", 2)


def count_in(counters) -> None:
    """Have this process count there."""
    global _counters
    _counters = counters


def advance(*, documents: int, tokens: int) -> None:
    """Add to the counters, where there are any."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += documents
            _counters[1] += tokens


@contextlib.contextmanager
def progress_bar(name: str, total: int, counters, *, show: bool):
    """A bar over finished tasks, with documents/s and tokens/s while they run; yields the function that a finished task calls."""
    from tqdm import tqdm

    started = time.monotonic()
    stop = threading.Event()
    with tqdm(
        total=total, desc=name, unit="part", file=sys.stderr, disable=not show, dynamic_ncols=True
    ) as bar:

        def watch():
            while not stop.wait(1):
                seconds = time.monotonic() - started
                rates = f"{counters[1]:,} tokens, {counters[1] / seconds:,.0f} tokens/s, {counters[0] / seconds:,.0f} documents/s"
                bar.set_postfix_str(rates if counters[1] else "")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bar.update
        finally:
            stop.set()
            watcher.join()
