"""The last step of a job: the index of each split, the manifest, and the move to data.path."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import HELDOUT, TRAIN, split_number
from retemper.pipeline.corpus.manifest import MANIFEST, READ_BY_TRAINING, SOURCES, read_verified
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.digest import sha256
from retemper.pipeline.files.progress_bar import ProgressBar
from retemper.pipeline.files.sealed import dump_sealed
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder

_READERS = 8  # threads that verify a corpus


class Publish(PipelineStep):
    """Assemble the corpus from its buckets, write the manifest last, and move all to data.path."""

    name, type = "🏁 Publish", "💽 - WRITER"

    def __init__(
        self, data: CorpusConfig, work: Path, tokenizer_sha256: str, token_bytes: np.ndarray
    ):
        super().__init__()
        self.data = data
        self.work = work
        self.tokenizer_sha256 = tokenizer_sha256
        self.token_bytes = token_bytes

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        with job_folder.record_failure(self.work):
            self._publish()
        yield from ()

    def _publish(self) -> None:
        plan = job_folder.load_plan(self.work)
        out = self.work / "out"
        parts = job_folder.all_parts_done(self.work, plan)
        buckets = _finished_buckets(self.work, plan)
        splits = {
            split: _totals([done["counts"] for done in markers])
            for split, markers in buckets.items()
        }
        if not splits[TRAIN]["samples"]:
            dropped = _dropped(plan, parts, splits)
            job_folder.remove(self.work)
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            raise UserError(
                f"data.source.path={self.data.source.path}: its documents fill no sample of "
                f"{self.data.seq_length} tokens (read: {_read(plan, parts):,}; "
                f"dropped: {reasons or 'none'}); "
                + _advice(self.data, dropped, _total(parts, "read"))
            )
        if self.data.heldout_fraction and not splits[HELDOUT]["samples"]:
            job_folder.remove(self.work)
            raise UserError(_no_heldout(self.data, splits))
        fingerprint = hashlib.sha256()
        for split, count in plan.buckets.items():
            # Leftovers are from a plan with more buckets, made before the source changed.
            for leftover in sorted((out / split).iterdir())[count:]:
                job_folder.remove(leftover)
            fingerprint.update(_merge_indexes(out / split, count))
        sources = [file for part in parts for file in part["sources"]]
        _write_lines(out / SOURCES, sources)
        _write_lines(
            out / "contaminated.jsonl",
            [match for part in parts for match in part.get("matches", [])],
        )
        np.save(out / "token_bytes.npy", self.token_bytes)
        manifest = _manifest(self.data, plan, parts, splits) | {
            "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": len(self.token_bytes),
            "fingerprint": fingerprint.hexdigest(),
        }
        manifest["near_duplicates"] = {"action": self.data.near_duplicates}
        if self.data.near_duplicates != "keep":
            pairs = [pair for done in buckets[TRAIN] for pair in done["near_duplicates"]]
            compared_with = _unique_documents(splits[HELDOUT])
            counts = {"documents": len(pairs), "compared_with": compared_with}
            manifest["near_duplicates"] |= counts
            _write_lines(
                out / "near_duplicates.jsonl", [_pair_record(pair, sources) for pair in pairs]
            )
        manifest["source"]["fingerprint"] = _sha256(
            "".join(file["sha256"] for file in sources).encode()
        )
        named = [*READ_BY_TRAINING, *(path.name for path in sorted(out.glob("*.jsonl")))]
        manifest["files"] = {name: sha256(out / name) for name in named}
        replace_file(out / MANIFEST, dump_sealed(manifest))
        _move_or_upload(out, self.data.path)
        job_folder.remove(self.work)


def _advice(data: CorpusConfig, dropped: dict[str, int], records: int) -> str:
    if dropped.get("no_text") == records > 0:
        columns = (
            f", and {{…}} of data.source.prompt={data.source.prompt!r} other columns"
            if data.source.prompt
            else ""
        )
        return (
            f"no record has text: data.source.text_key={data.source.text_key} "
            f"names its column{columns}; correct them"
        )
    return (
        "provide more text, set a smaller data.seq_length, or correct the setting that dropped them"
    )


def _no_heldout(data: CorpusConfig, splits: dict[str, dict]) -> str:
    """Explain why there is no held-out sample, and which settings produce some."""
    unique = _unique_documents(splits[HELDOUT])
    keeps_whole = data.keeps_whole and data.source.prompt is not None
    whole = "whole documents of at most " if keeps_whole else ""
    train = splits[TRAIN]
    return (
        f"data.heldout_fraction={data.heldout_fraction} of {data.source.path} is {unique:,} "
        f"documents, which fill no held-out sample of {whole}{data.seq_length} tokens "
        f"(train: {train['documents']:,} documents, {train['samples']:,} samples). Raise "
        "data.heldout_fraction, provide more text, or set data.heldout_fraction=0 for a corpus "
        "without held-out text"
    )


def _unique_documents(heldout: dict) -> int:
    """Count the documents of the held-out split, whether or not they are in its samples."""
    return heldout["documents"] + heldout["dropped_tail"] + heldout["dropped_longer_than_sample"]


def _pair_record(pair: tuple[int, int], sources: list[dict]) -> dict[str, str]:
    """Return a training document and its held-out near-duplicate, each as "path:position"."""
    locations = [split_number(number) for number in pair]
    document, heldout = (f"{sources[file]['path']}:{position}" for file, position in locations)
    return {"document": document, "heldout": heldout}


def find_damaged(path: str, manifest: dict) -> str | None:
    """Return the first file of a corpus that is missing or has another hash; None if all is well.

    Args:
        path: The corpus.
        manifest: Its manifest, which has the hashes, or names the indexes that have them.
    """
    if damaged := _first_damaged(path, manifest["files"]):
        return damaged
    shards = {}
    for split in (TRAIN, HELDOUT):
        index = read_verified(path, manifest, f"{split}/index.json")
        for shard in json.loads(index)["shards"]:
            data = shard["zip_data"] or shard["raw_data"]
            shards[f"{split}/{data['basename']}"] = data["hashes"]["sha256"]
    return _first_damaged(path, shards)


def _first_damaged(path: str, hashes: dict[str, str]) -> str | None:
    def is_intact(name: str) -> bool:
        try:
            return _sha256(store.read(f"{path}/{name}")) == hashes[name]
        except store.FileMissing:
            return False

    with (
        ThreadPoolExecutor(_READERS) as pool,
        ProgressBar(total=len(hashes), desc=f"verifying {path}", unit="file") as bar,
    ):
        for name, intact in zip(hashes, pool.map(is_intact, hashes), strict=True):
            bar.update()
            if not intact:
                pool.shutdown(cancel_futures=True)
                return name
    return None


def _finished_buckets(work: Path, plan: job_folder.Plan) -> dict[str, list[dict]]:
    """Return the done-markers of each split's buckets; raise UserError if a bucket has none."""
    markers: dict[str, list[dict]] = {TRAIN: [], HELDOUT: []}
    for split, number in plan.bucket_ids:
        done = job_folder.bucket_done(work, plan, split, number)
        if done is None:
            folder = job_folder.bucket_folder(work, split, number)
            raise UserError(
                f"{folder} is not finished or was damaged afterwards: run the same command again"
            )
        markers[split].append(done)
    return markers


def _totals(buckets: list[dict]) -> dict:
    total = {name: sum(counts[name] for counts in buckets) for name in buckets[0]}
    positions = total["tokens"] + total["padding_tokens"]
    return {
        **total,
        "padding_fraction": total["padding_tokens"] / positions if positions else 0.0,
        "cut_documents_fraction": total["cut_documents"] / total["documents"]
        if total["documents"]
        else 0.0,
    }


def _merge_indexes(folder: Path, count: int) -> bytes:
    """Write index.json of a split from those of its buckets.

    Returns:
        A hash of the content of its samples, which does not depend on the compression.
    """
    shards = []
    content = hashlib.sha256(folder.name.encode())
    for number in range(count):
        for shard in json.loads((folder / f"{number:05d}" / "index.json").read_text())["shards"]:
            content.update(bytes.fromhex(shard["raw_data"]["hashes"]["sha256"]))
            for data in (shard["raw_data"], shard["zip_data"]):
                if data:
                    data["basename"] = f"{number:05d}/{data['basename']}"
            shards.append(shard)
    replace_file(
        folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True)
    )
    return content.digest()


def _manifest(data: CorpusConfig, plan: job_folder.Plan, parts: list[dict], splits: dict) -> dict:
    count_names = (
        "documents",
        "samples",
        "tokens",
        "bytes",
        "padding_tokens",
        "padding_fraction",
        "cut_documents",
        "cut_documents_fraction",
        "cut_tokens",
    )
    manifest = {
        "name": data.name,
        "made_from": plan.made_from,
        "seq_length": data.seq_length,
        "packing": data.packing,
        "encoder": plan.encoder,
        "splits": {
            split: {name: counts[name] for name in count_names} for split, counts in splits.items()
        },
        "documents_read": _read(plan, parts),
        "dropped": _dropped(plan, parts, splits),
        "broken_files": [file for part in parts for file in part.get("broken", [])],
        "source": {"root": plan.root, "files": plan.source_files, "bytes": plan.source_bytes},
        "versions": {
            name: version(name)
            for name in ("retemper", "datatrove", "mosaicml-streaming", "tokenizers", "gigatoken")
        },
    }
    if marked := _total(parts, "repository_marks"):
        action = data.clean.repository_marks
        manifest["repository_marks"] = {"action": action, "documents": marked}
    if data.decontaminate:
        manifest["decontamination"] = _decontamination(plan, parts)
    return manifest


def _read(plan: job_folder.Plan, parts: list[dict]) -> int:
    """Count the records, and the files that were left out unread."""
    return _total(parts, "read") + sum(plan.left_out.values())


def _total(parts: list[dict], name: str) -> int:
    return sum(part["counts"].get(name, 0) for part in parts)


def _dropped(plan: job_folder.Plan, parts: list[dict], splits: dict) -> dict[str, int]:
    """Count the dropped documents by reason, without the reasons that dropped none."""
    dropped = Counter(plan.left_out)
    for counts in [*(part["counts"] for part in parts), *splits.values()]:
        dropped.update(
            {
                name.removeprefix("dropped_"): count
                for name, count in counts.items()
                if name.startswith("dropped_")
            }
        )
    return {reason: count for reason, count in sorted(dropped.items()) if count}


def _decontamination(plan: job_folder.Plan, parts: list[dict]) -> dict:
    documents: dict[str, int] = {}
    for part in parts:
        for match in part.get("matches", []):
            task = match["problem"].split(": ")[0]
            documents[task] = documents.get(task, 0) + 1
    tasks = plan.made_from["decontaminate"]["problems"]
    return {
        "tasks": {
            task: {**counts, "documents_dropped": documents.get(task, 0)}
            for task, counts in tasks.items()
        }
    }


def _move_or_upload(out: Path, path: str) -> None:
    """Move the finished folder to `path`, or upload it there with the manifest last."""
    if "://" in path:
        _upload(out, path)
        return
    incoming = Path(path + ".incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        out.rename(incoming)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(out, incoming)  # data.work_dir is on another file system
    if os.path.lexists(path):  # an earlier version of this corpus that lost shards
        shutil.rmtree(path)
    incoming.rename(path)


def _upload(out: Path, path: str) -> None:
    target = get_datafolder(path)
    # The manifest of an earlier version of this corpus that lost shards: while the upload is
    # incomplete there must be none.
    if target.exists(MANIFEST):
        target.rm_file(MANIFEST)
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.name != MANIFEST)
    for file in [*files, out / MANIFEST]:
        name = str(file.relative_to(out))
        with open(file, "rb") as source, target.open(name, "wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
        if target.info(name)["size"] != file.stat().st_size:
            raise UserError(
                f"{path}/{name} has another size than the uploaded file: run the same command again"
            )


def _write_lines(path: Path, records: list[dict]) -> None:
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
