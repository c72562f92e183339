"""Test which heavy libraries each verb imports: they cost seconds and hundreds of megabytes."""

import json
import resource
import subprocess
import sys

import pytest
from conftest import ROOT, overrides

from retemper.pipeline.config.compose import load_config

HEAVY = {"torch", "megatron", "transformers", "streaming", "datatrove", "sklearn", "scipy"}
HEAVY |= {"pandas", "matplotlib", "wandb", "lm_eval", "datasets", "peft", "pyarrow", "requests"}

# Runs the command and prints its exit code and the imported modules.
REPORT = (
    "import json, sys; from retemper.pipeline.cli import main; "
    "code = main(sys.argv[1:]); "
    "print(json.dumps([code, sorted(sys.modules)]))"
)
# Runs the command up to its first document, and prints the imported modules, the peak memory and
# the CPU time.
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


def run(code: str, *arguments: str) -> list:
    """Run Python code in a new process, and return the JSON of its last line of output."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def started_run(workspace) -> str:
    """Return the folder of a run that has started and has no scores."""
    config = load_config(overrides(workspace, "begun"))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    return str(config.run_dir)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["config", "run=demo_lora"], 0),
        (["config", "--docs"], 0),
        (["plan", "run=demo_full"], 0),
        (["plan", "run=demo_full", "--gpu-memory", "0.001"], 1),  # it looks for a layout that fits
        (["launch", "run=demo_full", "--target", "slurm"], 0),
        (["data", "show", "RUN", "--step", "1"], 0),
        (["eval", "show", "RUN"], 1),  # the run has no scores yet
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_light_verbs_import_no_heavy_libraries(started_run, arguments, exit_code):
    code, modules = run(REPORT, *(started_run if word == "RUN" else word for word in arguments))
    assert code == exit_code
    assert not HEAVY & set(modules)


def test_tokenize_reads_its_first_document_with_few_heavy_libraries(workspace, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.jsonl").write_text('{"text": "one"}')
    keys = {
        "data": "local",
        "data.source.path": tmp_path / "docs",
        "data.tokenizer": workspace / "data" / "tokenizer",
        "data.path": tmp_path / "shards",
    }
    arguments = [f"{key}={value}" for key, value in keys.items()]
    _, modules, kilobytes, seconds = run(FIRST_DOCUMENT, "tokenize", *arguments)
    assert HEAVY & set(modules) <= {"datatrove", "pyarrow", "requests"}
    assert kilobytes < 400_000
    print(f"\n{seconds:.1f} CPU-seconds, {kilobytes / 1000:.0f} MB before the first document")


def test_a_corpus_of_one_part_is_written_in_one_process_without_transformers(workspace, tmp_path):
    """Check that the MDS writer of streaming is imported without the rest of that library."""
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
