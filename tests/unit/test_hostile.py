"""Test that every record of hostile input is written or counted under the reason of its drop."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import data_config
from hostile import write_hostile_corpus

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.errors import UserError
from retemper.tokenize.job import tokenize

JOB = """
import json, sys, threading
import psutil
from retemper.pipeline.schema.data import DataConfig
from retemper.tokenize.job import tokenize

peak, done = [0], threading.Event()

def watch():  # ru_maxrss would include the peak of the parent process
    while not done.wait(0.05):
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                status = open(f"/proc/{process.pid}/status").read()
                peak[0] = max(peak[0], int(status.partition("VmHWM:")[2].split()[0]) * 1024)
            except (OSError, IndexError):
                pass  # the process has ended

if __name__ == "__main__":
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        manifest = tokenize(DataConfig.model_validate_json(sys.argv[1]), progress=False)
    finally:
        done.set()
    print(json.dumps({"manifest": manifest, "peak_bytes": peak[0]}))
"""


def run_job(workspace, tmp_path, records: int, giant_bytes: int, **changes) -> dict:
    """Tokenize a hostile corpus in a separate process and check every count.

    Returns:
        Its manifest and the peak memory of a process in bytes.
    """
    dropped, good, damaged = write_hostile_corpus(tmp_path / "docs", records, giant_bytes)
    source = {"kind": "rows", "path": str(tmp_path / "docs")}
    corpus = data_config(
        workspace,
        "hostile",
        path=str(tmp_path / "out"),
        heldout_fraction=0.0,
        allow_broken_files=True,
        tasks=2,
        source=source,
        **changes,
    )
    (tmp_path / "job.py").write_text(JOB)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), corpus.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    manifest = result["manifest"]
    out = manifest["splits"]["train"]["documents"] + manifest["dropped"].pop("tail", 0)
    assert Counter(manifest["dropped"]) == dropped
    assert out == len(good)
    assert manifest["documents_read"] == out + dropped.total()
    assert sorted(Path(file["file"]).name for file in manifest["broken_files"]) == damaged
    return result | {"corpus": corpus, "good": good}


def decoded(corpus) -> list[str]:
    """Return the documents of a corpus, joined from their pieces by document number."""
    shards = TokenShards(corpus.path, "train")
    tokenizer = Tokenizer(corpus.tokenizer)
    pieces: dict[int, list] = {}
    samples = shards.samples(np.arange(len(shards)))
    for row, tokens in enumerate(samples.tokens_NT):
        ends = samples.values("lengths", row).cumsum()
        for document, piece in zip(samples.values("documents", row), np.split(tokens, ends)):
            pieces.setdefault(int(document), []).append(piece)
    texts = []
    for parts in pieces.values():
        # The samples are shuffled. The last piece of a document is the only one that ends in the
        # end-of-text token, so sorting by that puts it last.
        parts.sort(key=lambda ids: ids[-1] == tokenizer.eos_id)
        texts.append(
            tokenizer.backend.decode(np.concatenate(parts)[:-1].tolist(), skip_special_tokens=False)
        )
    return sorted(texts)


def test_every_record_is_written_or_counted_as_dropped(workspace, tmp_path):
    result = run_job(workspace, tmp_path, 1200, 3000, packing="best_fit", seq_length=4096)
    assert decoded(result["corpus"]) == sorted(result["good"])


@pytest.mark.slow
def test_ten_thousand_hostile_records_need_at_most_2_gib_per_process(workspace, tmp_path):
    result = run_job(workspace, tmp_path, 10_000, 200_000_000, seq_length=4096)
    assert result["peak_bytes"] <= 2 << 30, f"{result['peak_bytes'] / 2**30:.2f} GiB"
    print(
        f"\n{result['manifest']['documents_read']:,} records, "
        f"peak of a process: {result['peak_bytes'] / 2**30:.2f} GiB"
    )


def test_all_damaged_files_are_named_before_anything_is_written(workspace, tmp_path):
    _, _, damaged = write_hostile_corpus(tmp_path / "docs", 60, 300)
    corpus = data_config(
        workspace,
        "hostile",
        path=str(tmp_path / "out"),
        source={"kind": "rows", "path": str(tmp_path / "docs")},
    )
    with pytest.raises(UserError) as refusal:
        tokenize(corpus, progress=False)
    assert all(str(tmp_path / "docs" / name) in str(refusal.value) for name in damaged)
    assert not (tmp_path / "out").exists()
    for name in damaged:  # without the damaged files the same command works
        (tmp_path / "docs" / name).unlink()
    assert tokenize(corpus, progress=False)["broken_files"] == []


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_records_before_the_end_of_a_truncated_file_are_kept(workspace, tmp_path, suffix):
    lines = [
        json.dumps({"text": f"{number} {random.Random(number).randbytes(20_000).hex()}"}) + "\n"
        for number in range(40)
    ]
    compress = {
        "gz": gzip.compress,
        "zst": zstandard.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }[suffix]
    whole = compress("".join(lines).encode())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / f"cut.jsonl.{suffix}").write_bytes(whole[: len(whole) * 7 // 10])
    source = {"kind": "rows", "path": str(tmp_path / "docs")}
    corpus = data_config(
        workspace, "cut", path=str(tmp_path / "out"), source=source, heldout_fraction=0.0, tasks=1
    )
    with pytest.raises(UserError, match="data.allow_broken_files=true"):
        tokenize(corpus, progress=False)
    manifest = tokenize(corpus.model_copy(update={"allow_broken_files": True}), progress=False)
    assert (
        manifest["broken_files"][0]["records_read"]
        == manifest["documents_read"]
        > (0 if suffix == "bz2" else 20)
    )
