"""The job `retemper tokenize`: one corpus from documents to token shards, finished when its manifest stands."""

import hashlib
import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np

from retemper.pipeline.config import DataConfig, changed_keys
from retemper.pipeline.errors import UserError
from retemper.tokenize.split import HELDOUT, TRAIN
from retemper.tokenize.tokenizer import Tokenizer

MANIFEST = "manifest.json"


def tokenize(data: DataConfig, *, progress: bool = True) -> dict:
    """Write data.path from data.source, and return its manifest.

    A finished corpus is left as it is; one that was made from another configuration or tokenizer is refused. The folder appears
    under its name only when it is complete. Raises UserError.
    """
    tokenizer = Tokenizer(data.tokenizer)
    made_from = {**data.model_dump(exclude={"tasks", "path"}), "tokenizer": tokenizer.sha256}
    target = Path(data.path)
    if (target / MANIFEST).is_file():
        return _finished(target, made_from)
    if target.exists():
        raise UserError(f"data.path={target} exists but holds no {MANIFEST}: it is not a token corpus; choose another folder")
    from retemper.tokenize.sources import build_reader  # checks the source before anything is written

    reader = build_reader(data.source, progress=progress)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a job that was killed
    try:
        counts = _run_steps(data, tokenizer, reader, partial)
        manifest = _manifest(data, tokenizer, made_from, counts, partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _finished(target: Path, made_from: dict) -> dict:
    manifest = json.loads((target / MANIFEST).read_text())
    if changes := changed_keys(manifest["made_from"], made_from):
        raise UserError(
            "\n".join([f"{target} was made from another configuration:", *(f"  - data.{change}" for change in changes)])
            + "\nChange it back, choose another data.path, or remove the folder"
        )
    return manifest


def _run_steps(data: DataConfig, tokenizer: Tokenizer, reader, partial: Path) -> dict[str, int]:
    from datatrove.executor import LocalPipelineExecutor

    from retemper.tokenize.shards import Encode, WriteShards
    from retemper.tokenize.split import SplitByHash

    steps = [
        reader,
        SplitByHash(data.heldout_fraction),
        Encode(data.tokenizer),
        WriteShards(str(partial), data.seq_length, tokenizer.vocab_size),
    ]
    # A fresh logging folder every time: datatrove would skip ranks that an earlier, interrupted job marked complete.
    stats = LocalPipelineExecutor(steps, tasks=data.tasks, logging_dir=str(partial / "logs")).run()
    return {name: int(metric.total) for step in stats.stats for name, metric in step.stats.items()}


def _manifest(data: DataConfig, tokenizer: Tokenizer, made_from: dict, counts: dict[str, int], partial: Path) -> dict:
    from streaming.base.util import merge_index

    splits, digest = {}, hashlib.sha256()
    for split in (TRAIN, HELDOUT):
        samples = counts.get(f"{split}_samples", 0)
        splits[split] = {
            "documents": counts.get(split, 0),
            "samples": samples,
            "tokens": samples * data.seq_length,
            "bytes": counts.get(f"{split}_bytes", 0),
            "dropped_tail_tokens": counts.get(f"{split}_dropped_tail_tokens", 0),
        }
        if samples:
            logging.disable(logging.WARNING)  # streaming warns of the folders it was told to merge
            merge_index(str(partial / split))
            logging.disable(logging.NOTSET)
            digest.update((partial / split / "index.json").read_bytes())
    if not splits[TRAIN]["samples"]:
        raise UserError(
            f"data.source.path={data.source.path}: its {splits[TRAIN]['documents']} training documents fill no sample of "
            f"{data.seq_length} tokens; give more text or a smaller data.seq_length"
        )
    np.save(partial / "token_bytes.npy", tokenizer.token_bytes())
    return {
        "name": data.name,
        "made_from": made_from,
        "fingerprint": digest.hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "seq_length": data.seq_length,
        "packing": "concat",
        "splits": splits,
        "dropped": {name: count for name, count in counts.items() if name.startswith("dropped_")},
        "versions": {name: version(name) for name in ("retemper", "datatrove", "mosaicml-streaming", "tokenizers")},
    }
