"""Test leases between real processes, some of which are stopped or killed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retemper.pipeline.files.atomic import write_once
from retemper.pipeline.runs.leases import lease

CONTEXT = multiprocessing.get_context("fork")
SECONDS = 0.6  # how long a lease lasts without renewal


def can_take(folder: Path, name: str = "job", seconds: float = SECONDS) -> bool:
    """Return whether this process gets a lease, which it gives back at once."""
    with lease(folder, name, seconds) as taken:
        return taken


def hold_lease(folder: Path, ready) -> None:
    with lease(folder, "job", SECONDS) as taken:
        ready.put(taken)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lease of "job" until it is killed."""
    ready = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold_lease, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=10)
    yield process
    process.kill()
    process.join()


def test_a_lease_is_kept_while_its_holder_is_alive(tmp_path, holder):
    deadline = time.monotonic() + 4 * SECONDS
    while time.monotonic() < deadline:
        assert not can_take(tmp_path)
        time.sleep(SECONDS / 8)
    assert can_take(tmp_path, "another")


def test_the_lease_of_a_killed_holder_expires(tmp_path, holder):
    holder.kill()
    holder.join()
    assert not can_take(tmp_path)
    time.sleep(1.5 * SECONDS)
    assert can_take(tmp_path)


def test_a_lease_is_released_at_its_end_and_after_an_exception(tmp_path):
    with lease(tmp_path, "job", 60) as first:
        assert first
        assert not can_take(tmp_path)
    assert can_take(tmp_path)
    with pytest.raises(ValueError), lease(tmp_path, "job", 60):
        raise ValueError
    assert can_take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_resumed_holder_does_not_replace_the_result_of_its_successor(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(1.5 * SECONDS)
    with lease(tmp_path, "job", SECONDS) as taken:
        assert taken
        assert write_once(tmp_path / "result", b"the successor's")
        os.kill(holder.pid, signal.SIGCONT)
        assert not write_once(tmp_path / "result", b"the stopped one's")
    assert (tmp_path / "result").read_bytes() == b"the successor's"
    assert not list(tmp_path.glob(".result*"))


def take_lease(folder: Path, start, wins) -> None:
    start.wait()
    with lease(folder, "job", SECONDS) as taken:
        wins.put(taken)
        time.sleep(0.2)


def test_exactly_one_of_many_processes_takes_an_expired_lease(tmp_path):
    for _ in range(5):
        (tmp_path / "job.lease.7").touch()
        os.utime(tmp_path / "job.lease.7", (0, 0))
        start = CONTEXT.Event()
        wins = CONTEXT.Queue()
        processes = [
            CONTEXT.Process(target=take_lease, args=(tmp_path, start, wins)) for _ in range(8)
        ]
        for process in processes:
            process.start()
        start.set()
        assert sum(wins.get(timeout=10) for _ in processes) == 1
        for process in processes:
            process.join()


# A worker does the jobs that have no result, in random order, until all have one. Its leases are so
# short that one may also expire while its holder is alive.
WORK = """
import os, random, sys, time
from pathlib import Path
from retemper.pipeline.files.atomic import write_once
from retemper.pipeline.runs.leases import lease

folder, names = Path(sys.argv[1]), [f"job{number}" for number in range(int(sys.argv[2]))]
while todo := [name for name in names if not (folder / name).exists()]:
    for name in random.sample(todo, len(todo)):
        with lease(folder, name, 0.2) as taken:
            if taken and not (folder / name).exists():
                time.sleep(random.uniform(0.02, 0.1))
                if write_once(folder / name, str(os.getpid()).encode()):
                    with open(sys.argv[3], "a") as file:
                        file.write(f"{name}\\n")
    time.sleep(0.01)
"""


def test_workers_killed_at_random_do_every_job_exactly_once(tmp_path):
    jobs = 300
    log = tmp_path / "log"
    rng = random.Random(1)
    folder = tmp_path / "jobs"

    def start_worker():
        return subprocess.Popen([sys.executable, "-c", WORK, str(folder), str(jobs), str(log)])

    workers = [start_worker() for _ in range(4)]
    kills = 0
    while kills < 20 and len(list(folder.glob("job*"))) < jobs:
        time.sleep(rng.uniform(0.05, 0.15))
        victim = rng.randrange(4)
        kills += workers[victim].poll() is None
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = start_worker()
    for process in workers:
        assert process.wait(60) == 0
    assert kills == 20
    done = log.read_text().split() if log.exists() else []
    # A worker that is killed between its result and its line in the log has also done the job.
    assert {path.name for path in folder.glob("job*") if "lease" not in path.name} == {
        f"job{number}" for number in range(jobs)
    }
    assert len(done) == len(set(done))
    assert len(done) >= jobs - kills
