"""Test which heavy libraries each verb imports: they take seconds and hundreds of megabytes."""

import json
import resource
import subprocess
import sys

import pytest
from conftest import ROOT, overrides

from retemper.pipeline.config.compose import load_config

HEAVY = {"torch", "megatron", "transformers", "streaming", "datatrove", "sklearn", "scipy"}
HEAVY |= {"pandas", "matplotlib", "wandb", "lm_eval", "datasets", "peft", "pyarrow", "requests"}

REPORT = (
    "import json, sys; from retemper.pipeline.cli import main; "
    "code = main(sys.argv[1:]); "
    "print(json.dumps([code, sorted(sys.modules)]))"
)
# Prints the imports before the first document is read, and ends there.
FIRST_DOCUMENT = (
    "import json, os, resource, sys; from retemper.tokenize.sources import DocumentReader\n"
    "def read_part(self, part):\n"
    "    [peak] = [line for line in open('/proc/self/status') if line.startswith('VmHWM:')]\n"
    "    usage = resource.getrusage(resource.RUSAGE_SELF)\n"
    "    kilobytes = int(peak.split()[1])\n"
    "    print(json.dumps([0, sorted(sys.modules), kilobytes, usage.ru_utime]), flush=True)\n"
    "    os._exit(0)\n"
    "DocumentReader.read_part = read_part\n"
    "from retemper.pipeline.cli import main; main(sys.argv[1:])"
)


def run(code: str, *words: str) -> list:
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def begun(workspace) -> str:
    """Return the folder of a run that has begun and has no scores."""
    config = load_config(overrides(workspace, "begun"))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    return str(config.run_dir)


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["config", "run=demo_lora"], 0),
        (["config", "--docs"], 0),
        (["plan", "run=demo_full"], 0),
        (["launch", "run=demo_full", "--target", "slurm"], 0),
        (["data", "show", "BEGUN", "--step", "1"], 0),
        (["eval", "show", "BEGUN"], 1),  # it has no scores yet
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else "",
)
def test_a_light_verb_imports_nothing_heavy(begun, words, exit_code):
    code, modules = run(REPORT, *(begun if word == "BEGUN" else word for word in words))
    assert code == exit_code
    assert not HEAVY & set(modules)


def test_tokenize_reads_its_first_document_soon(workspace, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.jsonl").write_text('{"text": "one"}')
    keys = {
        "data": "local",
        "data.source.path": tmp_path / "docs",
        "data.tokenizer": workspace / "data" / "tokenizer",
        "data.path": tmp_path / "shards",
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    _, modules, kilobytes, seconds = run(FIRST_DOCUMENT, "tokenize", *words)
    assert HEAVY & set(modules) <= {"datatrove", "pyarrow", "requests"}
    assert kilobytes < 400_000
    print(f"\n{seconds:.1f} CPU-seconds, {kilobytes / 1000:.0f} MB before the first document")


def test_a_corpus_of_one_part_is_written_in_this_process_without_transformers(workspace, tmp_path):
    """Check that streaming's writer is imported without the rest of that library."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.jsonl").write_text(json.dumps({"text": "one two three " * 60}))
    keys = {
        "data": "local",
        "data.source.path": tmp_path / "docs",
        "data.tokenizer": workspace / "data" / "tokenizer",
        "data.path": tmp_path / "shards",
        "data.seq_length": 64,
        "data.heldout_fraction": 0,
        "data.tasks": 2,
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, modules = run(REPORT, "tokenize", *(f"{key}={value}" for key, value in keys.items()))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0
    assert HEAVY & set(modules) <= {"datatrove", "pyarrow", "requests", "torch"}
    assert "retemper.tokenize.mds_writer" in modules  # no worker processes
    print(f"\n{after.ru_utime - before.ru_utime:.1f} CPU-seconds for a corpus of one document")
