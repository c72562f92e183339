"""Test that a run folder of an earlier commit is read and continued, with the same numbers."""

import json
import re
import shutil
import tarfile

import pytest
from conftest import ROOT, run_command

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.files.sealed import dump_sealed

DATA = [
    "data=local",
    "data.name=sums",
    "data.source.path=documents",
    "data.tokenizer=tokenizer",
    "data.path=shards",
    "data.seq_length=32",
    "data.heldout_fraction=0.2",
]
RUN = [
    "study=old",
    *DATA,
    "precision=fp32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.tokens=1024",
    "train.log_every_steps=1",
    "schedule.warmup_tokens=256",
    "evals=none",
    "evals.heldout.sums=shards",
    "checkpoint.save_every_steps=4",
    "track.wandb=off",
]
SHAPE = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "vocab_size": 280,
    "max_sequence_length": 32,
}
METHODS = {
    "full": [*(f"model.{key}={value}" for key, value in SHAPE.items()), "optimizer.lr=5e-3"],
    "lora": [
        "init_from=runs/old/full",
        "method=lora",
        "method.lora.rank=2",
        "optimizer.lr=1e-2",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the unpacked archive."""
    folder = tmp_path_factory.mktemp("old_run")
    with tarfile.open(ROOT / "tests" / "old_run" / "run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def records(path):
    """Return the record of each step in metrics.jsonl."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: [line[key] for key in ("loss", "grad_norm", "lr")] for line in lines}


def test_a_corpus_is_recognised(folder):
    before = (folder / "shards" / "manifest.json").read_bytes()
    done = run_command(["tokenize", *DATA], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "shards" / "manifest.json").read_bytes() == before


# LoRA comes second: its base has trained on since, and it finds the checkpoint it began from.
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_continues_with_the_losses_of_its_commit(folder, name):
    done = run_command(["train", *RUN, f"name={name}", *METHODS[name]], cwd=folder)
    assert done.returncode == 0, done.stderr
    found = records(folder / "runs" / "old" / name / "metrics.jsonl")
    expected = records(folder / "expected" / f"{name}.jsonl")
    assert found.keys() == expected.keys() == {*range(1, 9)}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5), step
    scores = folder / "runs" / "old" / name / "evals" / "00000008" / "heldout.json"
    then = json.loads((folder / "expected" / f"{name}-heldout.json").read_text())["sums"]
    now = json.loads(scores.read_text())["sums"]
    assert now["bits_per_byte"] == pytest.approx(then["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "planted"), [("new", "full"), pytest.param("lora", "lora", marks=pytest.mark.slow)]
)
def test_code_in_a_checkpoint_is_refused_and_not_run(folder, tmp_path, name, planted):
    """Check a base and the own checkpoint; meta.json has the hash of what is planted."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    checkpoint = commit.newest(tmp_path / "runs" / "old" / planted)
    (checkpoint / ".metadata").write_text(f"cposix\nsystem\n(Vtouch {tmp_path}/ran\ntR.")
    meta = commit.sealed_meta(checkpoint)
    meta["files"][".metadata"] = commit.sha256(checkpoint / ".metadata")
    (checkpoint / commit.META).write_text(dump_sealed(meta))
    done = run_command(["train", *RUN, f"name={name}", *METHODS["lora"]], cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"\nerror: \S*/\.metadata names posix\.system.*\n$", done.stderr), done.stderr
    assert not (tmp_path / "ran").exists()
