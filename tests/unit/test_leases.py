"""Test leases among real processes that are killed at random moments."""

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
SECONDS = 0.6  # of a lease


def held(folder: Path, name: str = "job", seconds: float = SECONDS) -> bool:
    with lease(folder, name, seconds) as taken:
        return taken


def hold_for_ever(folder: Path, ready) -> None:
    with lease(folder, "job", SECONDS) as taken:
        ready.put(taken)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds a lease."""
    ready = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold_for_ever, args=(tmp_path, ready))
    process.start()
    assert ready.get(timeout=10)
    yield process
    process.kill()
    process.join()


def test_a_lease_is_its_holders_for_as_long_as_it_lives(tmp_path, holder):
    deadline = time.monotonic() + 4 * SECONDS
    while time.monotonic() < deadline:
        assert not held(tmp_path)
        time.sleep(SECONDS / 8)
    assert held(tmp_path, "another")


def test_a_killed_holders_lease_expires(tmp_path, holder):
    holder.kill()
    holder.join()
    assert not held(tmp_path)
    time.sleep(1.5 * SECONDS)
    assert held(tmp_path)


def test_a_lease_is_given_back(tmp_path):
    with lease(tmp_path, "job", 60) as first:
        assert first and not held(tmp_path)
    assert held(tmp_path)
    with pytest.raises(ValueError), lease(tmp_path, "job", 60):
        raise ValueError
    assert held(tmp_path) and not list(tmp_path.iterdir())


def test_a_stopped_holder_that_goes_on_does_not_count_twice(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(1.5 * SECONDS)
    with lease(tmp_path, "job", SECONDS) as taken:
        assert taken and write_once(tmp_path / "result", b"the successor's")
        os.kill(holder.pid, signal.SIGCONT)
        assert not write_once(tmp_path / "result", b"the stopped one's")
    assert (tmp_path / "result").read_bytes() == b"the successor's"
    assert not list(tmp_path.glob(".result*"))


def race(folder: Path, start, wins) -> None:
    start.wait()
    with lease(folder, "job", SECONDS) as taken:
        wins.put(taken)
        time.sleep(0.2)


def test_of_many_that_find_an_expired_lease_one_takes_it(tmp_path):
    for _ in range(5):
        (tmp_path / "job.lease.7").touch()
        os.utime(tmp_path / "job.lease.7", (0, 0))
        start, wins = CONTEXT.Event(), CONTEXT.Queue()
        racers = [CONTEXT.Process(target=race, args=(tmp_path, start, wins)) for _ in range(8)]
        for racer in racers:
            racer.start()
        start.set()
        assert sum(wins.get(timeout=10) for _ in racers) == 1
        for racer in racers:
            racer.join()


# Does every job that has no result, in some order, until all have one. Leases so short may expire
# while their holder is alive, too.
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


def test_workers_killed_at_random_leave_every_job_done_once(tmp_path):
    jobs, log, draw = 300, tmp_path / "log", random.Random(1)
    folder = tmp_path / "jobs"

    def worker():
        return subprocess.Popen([sys.executable, "-c", WORK, str(folder), str(jobs), str(log)])

    workers, kills = [worker() for _ in range(4)], 0
    while kills < 20 and len(list(folder.glob("job*"))) < jobs:
        time.sleep(draw.uniform(0.05, 0.15))
        victim = draw.randrange(4)
        kills += workers[victim].poll() is None
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = worker()
    for process in workers:
        assert process.wait(60) == 0
    assert kills == 20
    done = log.read_text().split() if log.exists() else []
    # A worker killed between its result and its line in the log has done the job all the same.
    assert {path.name for path in folder.glob("job*") if "lease" not in path.name} == {
        f"job{number}" for number in range(jobs)
    }
    assert len(done) == len(set(done)) and len(done) >= jobs - kills
