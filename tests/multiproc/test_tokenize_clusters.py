"""Test that Slurm's arrays and Ray's tasks write the same corpus as this machine's pool.

They run on a real slurmctld and a real Ray cluster.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import one_node_slurm
import pytest
from conftest import ROOT, data_config

pytestmark = pytest.mark.slow  # four minutes of Slurm's and Ray's own start

JOB = ROOT / "tests" / "helpers" / "tokenize_job.py"


@pytest.fixture(scope="module")
def corpus(workspace):
    """Return a function of a folder and changes -> a corpus of several parts and buckets."""

    def config(path: Path, **changes):
        source = {"kind": "text", "path": "stdlib", "glob": "[a-d]*.py"}
        return data_config(
            workspace, "cluster", path=str(path), source=source, compression="zstd", **changes
        )

    return config


def run_job(config, environment=None, timeout: int = 400) -> subprocess.CompletedProcess:
    command = [sys.executable, str(JOB), config.model_dump_json(), "300000", "1500000"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("local") / "out"
    result = run_job(corpus(path, tasks=1))
    assert result.returncode == 0, result.stderr
    return contents(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_ray(corpus, expected, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'retemper[ray]'")
    result = run_job(
        corpus(tmp_path / "out", executor="ray", tasks=2),
        os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "out") == expected
    result = run_job(
        corpus(tmp_path / "more", executor="ray", tasks=2, tokens="1B"),
        os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert result.returncode == 1 and "the corpus has" in result.stderr


@pytest.mark.skipif(one_node_slurm.missing() is not None, reason=str(one_node_slurm.missing()))
def test_slurm(corpus, expected, tmp_path):
    (tmp_path / "slurm").mkdir()
    with one_node_slurm.cluster(tmp_path / "slurm") as environment:
        config = corpus(
            tmp_path / "out",
            executor="slurm",
            tasks=2,
            slurm={"partition": "cpu", "time": "00:20:00", "mem_per_cpu_gb": 1},
        )
        result = run_job(config, environment)
        assert result.returncode == 0 and json.loads(result.stdout.splitlines()[-1]) is None, (
            result.stderr[-3000:]
        )
        again = run_job(config, environment)
        assert again.returncode == 1 and "already" in again.stderr
        deadline = time.monotonic() + 400
        while not (tmp_path / "out" / "manifest.json").exists():
            jobs = subprocess.run(
                ["squeue", "-h", "-o", "%j %t %r"], env=environment, capture_output=True, text=True
            ).stdout
            logs = "\n".join(
                path.read_text()[-1500:]
                for path in tmp_path.glob("out.partial/logs/*/slurm_logs/*")
            )
            assert jobs and time.monotonic() < deadline, f"{jobs}\n{logs}"
            time.sleep(1)
        assert contents(tmp_path / "out") == expected
