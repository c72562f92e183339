"""Test hub sources: the revision is resolved to a commit, recorded, and kept after a restart."""

import json
import os
import subprocess
import sys

import hub
from conftest import ROOT, data_config

JOB = ROOT / "tests" / "helpers" / "tokenize_job.py"
FIRST = "1" * 40
SECOND = "2" * 40


def files(word: str) -> dict[str, bytes]:
    rows = [
        json.dumps({"text": f"{word} document {number} of the dataset\n" * 20}).encode()
        for number in range(30)
    ]
    return {
        "data/a.jsonl": b"\n".join(rows[:15]),
        "data/b.jsonl": b"\n".join(rows[15:]),
        "README.md": b"# Not rows",
    }


def run_job(corpus, endpoint: str, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, str(JOB), corpus.model_dump_json(), str(64 << 20), str(256 << 20)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_a_hub_source_is_pinned_to_a_commit(workspace, tmp_path):
    branches = {"main": FIRST}
    server, requested = hub.serve(
        "someone/docs", {FIRST: files("first"), SECOND: files("second")}, branches
    )
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        source = {"kind": "rows", "path": "hf://datasets/someone/docs/data"}
        corpus = data_config(
            workspace,
            "hub",
            path=str(tmp_path / "out"),
            source=source,
            tasks=1,
            heldout_fraction=0.0,
        )
        result = run_job(corpus, endpoint, tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        manifest = json.loads(result.stdout.splitlines()[-1])
        assert manifest["source"]["root"] == f"hf://datasets/someone/docs@{FIRST}/data"
        assert manifest["documents_read"] == 30
        assert manifest["source"]["files"] == 2
        assert f"/datasets/someone/docs/resolve/{FIRST}/data/a.jsonl" in requested

        # An unfinished job keeps its commit after the branch has moved to another one.
        (tmp_path / "out").rename(tmp_path / "finished")
        corpus = corpus.model_copy(update={"tokens": 10**9})
        assert "the corpus has" in run_job(corpus, endpoint, tmp_path).stderr
        branches["main"] = SECOND
        requested.clear()
        assert "the corpus has" in run_job(corpus, endpoint, tmp_path).stderr
        assert not any(SECOND in path for path in requested)

        missing = corpus.model_copy(
            update={
                "path": str(tmp_path / "x"),
                "source": corpus.source.model_copy(update={"revision": "nowhere"}),
            }
        )
        result = run_job(missing, endpoint, tmp_path)
        assert result.returncode == 1
        assert "the hub does not provide revision nowhere" in result.stderr
    finally:
        server.shutdown()
