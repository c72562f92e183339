"""Test that the corpus is the same to the byte whatever interrupted the tokenize job.

The job is killed anywhere, some of what it wrote is deleted, and the same command runs again.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, data_config

JOB = ROOT / "tests" / "helpers" / "tokenize_job.py"


@pytest.fixture(scope="module")
def job(workspace, tmp_path_factory):
    """Return start(folder, log) -> a running job on real code.

    The job has about twenty parts, six buckets and two workers.
    """
    folder = tmp_path_factory.mktemp("kill")
    source = {"kind": "text", "path": "stdlib", "glob": "[a-m]*.py"}

    def start(path: Path, log: Path) -> subprocess.Popen:
        corpus = data_config(
            workspace,
            "kill",
            path=str(path),
            source=source,
            compression="zstd",
            tasks=2,
            packing="best_fit",
        )
        command = [sys.executable, str(JOB), corpus.model_dump_json(), "150000", "750000"]
        with open(log, "w") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    started = time.monotonic()
    process = start(folder / "whole", folder / "log")
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()
    start.whole, start.seconds = folder / "whole", time.monotonic() - started
    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def kill_until_done(job, tmp_path: Path, kills: int, rng: random.Random) -> int:
    """Kill jobs at random moments, delete some of what they wrote, and start them again.

    Returns:
        The number of jobs that reached their end.
    """
    path, work, finished, ended = tmp_path / "out", tmp_path / "out.partial", 0, False
    while kills or not ended:
        process = job(path, tmp_path / "log")
        try:
            code = process.wait(timeout=rng.uniform(0, job.seconds * 1.1) if kills else 300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills, ended = kills - 1, False
            victims = [file for file in work.rglob("*") if file.is_file()]
            for victim in rng.sample(victims, min(len(victims), rng.choice([0, 0, 1, 5]))):
                victim.unlink(missing_ok=True)
            continue
        assert code == 0, (tmp_path / "log").read_text()
        assert contents(path) == contents(job.whole)
        finished, ended = finished + 1, True
        shutil.rmtree(path)
    assert not work.exists() and not work.with_name(work.name + ".lock").exists()
    return finished


def names_of(path: Path) -> list[Path]:
    """Return the semaphores and temporary folders of the job that writes a corpus."""
    work = path.with_name(f"{path.name}.partial")
    name = f"retemper-{hashlib.sha256(bytes(work)).hexdigest()[:12]}-*"
    return [*Path("/dev/shm").glob(f"sem.{name}"), *Path(tempfile.gettempdir()).glob(name)]


def test_a_kill_leaves_no_shared_memory_after_the_next_start(job, tmp_path):
    process = job(tmp_path / "out", tmp_path / "log")
    _worker_at_work(process, tmp_path / "out.partial")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert {path.parent for path in names_of(tmp_path / "out")} == {
        Path("/dev/shm"),
        Path(tempfile.gettempdir()),
    }
    assert job(tmp_path / "out", tmp_path / "log").wait(timeout=300) == 0
    assert names_of(tmp_path / "out") == []
    assert contents(tmp_path / "out") == contents(job.whole)


@pytest.mark.slow
def test_fifty_kills(job, tmp_path):
    finished = kill_until_done(job, tmp_path, 50, random.Random(50))
    print(
        f"\n50 kills over {job.seconds:.0f} s jobs, {finished} jobs reached their end, "
        "each equal to the uninterrupted one"
    )


def test_a_killed_worker_is_noticed_and_the_job_resumes(job, tmp_path):
    process = job(tmp_path / "out", tmp_path / "log")
    worker = _worker_at_work(process, tmp_path / "out.partial")
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(timeout=60) == 1
    assert "a worker process was killed" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()
    print(f"\nnoticed after {time.monotonic() - killed:.1f} s")
    assert job(tmp_path / "out", tmp_path / "log").wait(timeout=300) == 0, (
        tmp_path / "log"
    ).read_text()
    assert contents(tmp_path / "out") == contents(job.whole)


def test_workers_end_with_a_killed_parent(job, tmp_path):
    process = job(tmp_path / "out", tmp_path / "log")
    worker = _worker_at_work(process, tmp_path / "out.partial")
    process.kill()  # the parent alone, as the kernel would for want of memory
    process.wait()
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{worker}").exists()
        and "State:\tZ" not in Path(f"/proc/{worker}/status").read_text()
    ):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)


def _worker_at_work(process: subprocess.Popen, work: Path) -> int:
    """Return the process id of a worker once one of the parts is done.

    A worker is a child of the server process that workers are forked from.
    """
    deadline = time.monotonic() + 200
    while not list(work.glob("parts/*/done.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = [(int(child), parent) for child, parent in _processes()]
    server = [
        pid
        for pid, parent in children
        if parent == process.pid and any(other == pid for _, other in children)
    ]
    return next(pid for pid, parent in children if parent in server)


def _processes() -> list[tuple[str, int]]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append(
                (status.parent.name, int(status.read_text().rpartition(")")[2].split()[1]))
            )
        except OSError:
            continue
    return found


def test_the_manifest_reports_time_and_memory(job):
    manifest = json.loads((job.whole / "manifest.json").read_text())
    assert manifest["source"]["files"] > 50 and manifest["splits"]["train"]["samples"] > 1000
