"""Documents in = documents out + rejected by reason, exactly, whatever the world sends."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import data_config
from hostile import write_hostile_corpus

from retemper.pipeline.data.corpus import TokenShards
from retemper.pipeline.errors import UserError
from retemper.tokenize.job import tokenize
from retemper.tokenize.tokenizer import Tokenizer

JOB = """
import json, resource, sys
from retemper.pipeline.config import DataConfig
from retemper.tokenize.job import tokenize
if __name__ == "__main__":
    manifest = tokenize(DataConfig.model_validate_json(sys.argv[1]), progress=False)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"manifest": manifest, "peak_bytes": peak * 1024}))
"""


def check(workspace, tmp_path, records: int, giant_bytes: int) -> dict:
    dropped, good, damaged = write_hostile_corpus(tmp_path / "docs", records, giant_bytes)
    corpus = data_config(
        workspace, "hostile", path=str(tmp_path / "out"), heldout_fraction=0.0, packing="best_fit", seq_length=4096, tasks=2,
        allow_broken_files=True, source={"kind": "rows", "path": str(tmp_path / "docs")},
    )  # fmt: skip
    script = tmp_path / "job.py"
    script.write_text(JOB)
    run = subprocess.run([sys.executable, str(script), corpus.model_dump_json()], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    manifest = result["manifest"]
    assert Counter(manifest["dropped"]) == dropped
    assert manifest["splits"]["train"]["documents"] == len(good)
    assert manifest["documents_read"] == len(good) + dropped.total()
    assert sorted(Path(file["file"]).name for file in manifest["broken_files"]) == damaged
    assert decoded(corpus) == sorted(good)
    return result


def decoded(corpus) -> list[str]:
    """The documents of a corpus, put together from their pieces by document number."""
    shards, tokenizer = TokenShards(corpus.path, "train"), Tokenizer(corpus.tokenizer)
    pieces: dict[int, list] = {}
    for index in range(len(shards)):
        sample, position = shards.sample(index), 0
        for length, document in zip(sample["lengths"], sample["documents"]):
            pieces.setdefault(int(document), []).append(sample["tokens"][position : position + length])
            position += length
    texts = []
    for parts in pieces.values():
        # Cut in order, but samples are shuffled: only the last piece ends in end-of-text, and full ones are all of one document.
        parts.sort(key=lambda ids: ids[-1] == tokenizer.eos_id)
        texts.append(tokenizer.backend.decode(np.concatenate(parts)[:-1].tolist(), skip_special_tokens=False))
    return sorted(texts)


def test_every_record_is_a_document_or_counted(workspace, tmp_path):
    check(workspace, tmp_path, records=1200, giant_bytes=3000)


@pytest.mark.slow
def test_ten_thousand_hostile_records_in_two_gigabytes(workspace, tmp_path):
    dropped, good, _ = write_hostile_corpus(tmp_path / "docs", 10_000, 200_000_000)
    corpus = data_config(
        workspace, "hostile", path=str(tmp_path / "out"), heldout_fraction=0.0, seq_length=4096, tasks=2,
        allow_broken_files=True, source={"kind": "rows", "path": str(tmp_path / "docs")},
    )  # fmt: skip
    (tmp_path / "job.py").write_text(JOB)
    run = subprocess.run([sys.executable, str(tmp_path / "job.py"), corpus.model_dump_json()], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    out = result["manifest"]["splits"]["train"]["documents"] + result["manifest"]["dropped"].pop("tail", 0)
    assert Counter(result["manifest"]["dropped"]) == dropped and out == len(good)
    assert result["peak_bytes"] <= 2 << 30, f"{result['peak_bytes'] / 2**30:.2f} GiB"
    print(f"\npeak of a process: {result['peak_bytes'] / 2**30:.2f} GiB")


def test_damaged_files_are_all_named_before_anything_is_built(workspace, tmp_path):
    _, _, damaged = write_hostile_corpus(tmp_path / "docs", 60, 300)
    corpus = data_config(workspace, "hostile", path=str(tmp_path / "out"), source={"kind": "rows", "path": str(tmp_path / "docs")})
    with pytest.raises(UserError) as refusal:
        tokenize(corpus, progress=False)
    assert all(str(tmp_path / "docs" / name) in str(refusal.value) for name in damaged)
    assert not (tmp_path / "out").exists()
    for name in damaged:  # mended: the same command goes on
        (tmp_path / "docs" / name).unlink()
    assert tokenize(corpus, progress=False)["broken_files"] == []
