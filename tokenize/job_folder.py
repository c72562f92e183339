"""The folder of a job: its settings, its parts and buckets, and which of them are done.

work/plan.json            settings, source, encoder, the parts in order
work/parts/<id>/          one part of the source: inputs.json, the spool, done.json
work/buckets/<id>.json    a bucket's counts, written after its shards
work/out/                 the unfinished corpus

The id of a part is the hash of its inputs and of the settings: a job reuses a finished part only if
both are unchanged.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.distributed.unexpected import report_unexpected
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.digest import sha256
from retemper.pipeline.files.json_file import parse_json, read_json, with_other_keys
from retemper.tokenize.listing import COMPRESSED, FileRange

# Incremented when the same inputs and settings produce other bytes than before.
FORMAT = 2
# Bytes of documents in a bucket. One task packs a bucket in memory, except for the tokens.
_BUCKET_BYTES = 256 << 20
# Approximate bytes of text per byte of a compressed file. An error of a factor of two is harmless.
_EXPANSION = 4


@dataclass(frozen=True)
class Plan:
    """The plan of a job: what it was made from, its parts and its buckets."""

    made_from: dict
    root: str
    encoder: dict
    parts: list[str]
    buckets: dict[str, int]
    source_files: int
    source_bytes: int
    near_duplicates: str = "keep"  # data.near_duplicates; older plans lack it
    left_out: dict = field(default_factory=dict)  # files by reason; older plans lack it

    def save(self, work: Path) -> None:
        """Write plan.json."""
        replace_file(work / "plan.json", json.dumps(asdict(self), indent=1))

    @property
    def bucket_ids(self) -> list[tuple[str, int]]:
        """The (split, number) of every bucket, in the order of the tasks of the write stage."""
        return [(split, number) for split, count in self.buckets.items() for number in range(count)]

    def bucket_fingerprint(self, split: str, number: int, limit: int | None) -> str:
        """Return the hash of everything that a bucket's shards depend on.

        Args:
            split: The split of the bucket.
            number: The number of the bucket in its split.
            limit: The maximum number of samples or documents that the corpus takes from the
                bucket; None for all.
        """
        return _hash([FORMAT, self.made_from, self.parts, self.buckets, split, number, limit])


class _File(TypedDict):
    size: int
    sha256: str


@with_other_keys
class _Done(TypedDict):
    """What every done-marker has."""

    files: dict[str, _File]


def load_plan(work: Path) -> Plan:
    """Read the plan of a job, which must exist."""
    return _read(work / "plan.json", Plan, work)


def _read(path: Path, kind: Any, work: Path) -> Any:
    return read_json(path, kind, f"remove {work} and run the same command again")


def make_plan(
    work: Path,
    made_from: dict,
    root: str,
    encoder: dict,
    parts: list[list[FileRange]],
    *,
    left_out: dict[str, int],
    heldout_fraction: float,
    near_duplicates: str,
) -> Plan:
    """Write the plan and the inputs of its parts; parts that are done are recognized by their id.

    Args:
        work: The job's folder.
        made_from: The settings that determine the corpus.
        root: The folder of the source.
        encoder: The entry of the manifest about the encoder.
        parts: The files or ranges of files of each part, in order.
        left_out: The number of files of the source that are in no part, by reason.
        heldout_fraction: The fraction of the documents that are held out.
        near_duplicates: The value of data.near_duplicates; unless it is `keep`, sketches are made.
    """
    settings = {key: made_from[key] for key in made_from if key not in _PACKING_KEYS}
    if near_duplicates != "keep":
        settings["sketches"] = True
    ids = []
    for part in parts:
        inputs = [file.to_dict() for file in part]
        ids.append(_hash([FORMAT, settings, inputs])[:24])
        path = part_folder(work, ids[-1]) / "inputs.json"
        text = json.dumps(inputs)
        if not path.is_file() or path.read_bytes() != text.encode():
            replace_file(path, text)
    sizes = {(file.path, file.start): _text_bytes(file) for part in parts for file in part}
    train = max(1, -(-sum(sizes.values()) // _BUCKET_BYTES))
    plan = Plan(
        made_from=made_from,
        root=root,
        encoder=encoder,
        parts=ids,
        buckets={TRAIN: train, HELDOUT: max(1, round(train * heldout_fraction))},
        source_files=len({file.path for part in parts for file in part}),
        source_bytes=sum(file.end - file.start for part in parts for file in part),
        near_duplicates=near_duplicates,
        left_out=left_out,
    )
    plan.save(work)
    return plan


# Settings that take effect after the spool, and so do not change a part.
_PACKING_KEYS = (
    "name",
    "seq_length",
    "packing",
    "tokens",
    "compression",
    "allow_broken_files",
    "near_duplicates",
)


@contextlib.contextmanager
def record_failure(work: Path) -> Iterator[None]:
    """Record the reason of a failure in error.txt and raise it again.

    Otherwise the process that started the job would not see an exception on another machine.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else report_unexpected(error)
        replace_file(work / "error.txt", reason)
        raise


def pop_error(work: Path) -> str | None:
    """Return the reason of a failure that a task recorded, and delete it; None if there is none."""
    path = work / "error.txt"
    reason = path.read_text() if path.is_file() else None
    path.unlink(missing_ok=True)
    return reason


def remove(work: Path) -> None:
    """Delete a folder of intermediate files, if it exists."""
    shutil.rmtree(work, ignore_errors=True)


def part_folder(work: Path, part: str) -> Path:
    """Return the folder of a part's inputs, spool and done-marker."""
    return work / "parts" / part


def part_inputs(work: Path, part: str) -> list[FileRange]:
    """Return the files or ranges of files of a part."""
    return _read(part_folder(work, part) / "inputs.json", list[FileRange], work)


def read_done(
    marker: Path, folder: Path, fingerprint: str | None = None, *, verify: bool = False
) -> dict | None:
    """Return the content of a valid done-marker, or None.

    Args:
        marker: The file of the marker.
        folder: The folder that the marker is about.
        fingerprint: The fingerprint that the marker must have; None if it must have none.
        verify: Compare the hashes of the files, not only their sizes.

    Returns:
        None if the marker is missing or damaged, has another fingerprint, or lists a file that
        is missing or differs from what was written.
    """
    try:
        done = parse_json(marker.read_bytes(), _Done)
        intact = all(
            (folder / name).stat().st_size == file["size"]
            and (not verify or sha256(folder / name) == file["sha256"])
            for name, file in done["files"].items()
        )
    except (FileNotFoundError, ValueError):
        return None
    return done if intact and done.get("fingerprint") == fingerprint else None


def write_done(marker: Path, folder: Path, done: dict) -> None:
    """Mark the content of a folder as finished, after all of it is on the disk.

    Args:
        marker: The file of the marker.
        folder: The finished folder.
        done: The content of the marker; sizes and hashes of all files are added as `files`.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != marker:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            name = str(path.relative_to(folder))
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    replace_file(marker, json.dumps({**done, "files": files}))


def part_done(work: Path, part: str, *, verify: bool = False) -> dict | None:
    """Return the done-marker of a part, or None if its spool is not complete.

    verify: compare the hashes of its files, not only their sizes.
    """
    folder = part_folder(work, part)
    return read_done(folder / "done.json", folder, verify=verify)


def bucket_marker(work: Path, split: str, number: int) -> Path:
    """Return the path of a bucket's done-marker."""
    return work / "buckets" / f"{split}-{number:05d}.json"


def bucket_folder(work: Path, split: str, number: int) -> Path:
    """Return the folder of a bucket's shards."""
    return work / "out" / split / f"{number:05d}"


def bucket_done(
    work: Path, plan: Plan, split: str, number: int, *, verify: bool = False
) -> dict | None:
    """Return the done-marker of a bucket, or None if its shards are not complete and current.

    Args:
        work: The job's folder.
        plan: Its plan.
        split: The split of the bucket.
        number: The number of the bucket in its split.
        verify: Compare the hashes of its files, not only their sizes.
    """
    fingerprint = plan.bucket_fingerprint(split, number, read_limit(work, split, number))
    folder = bucket_folder(work, split, number)
    return read_done(bucket_marker(work, split, number), folder, fingerprint, verify=verify)


def write_limits(work: Path, limits: list[int | None]) -> None:
    """Write how many samples or documents the corpus takes from each training bucket."""
    replace_file(work / "chosen.json", json.dumps(limits))


def read_limit(work: Path, split: str, number: int) -> int | None:
    """Return the limit of a bucket; None means all, as for every held-out bucket."""
    if split != TRAIN:
        return None
    limits = Annotated[list[int | None], Field(min_length=number + 1)]
    return _read(work / "chosen.json", limits, work)[number]


def all_parts_done(work: Path, plan: Plan) -> list[dict]:
    """Return the done-markers of all parts, in order; raise UserError if a part is not done."""
    done = [marker for part in plan.parts if (marker := part_done(work, part)) is not None]
    if missing := len(plan.parts) - len(done):
        raise UserError(
            f"{missing} of {len(plan.parts)} parts in {work} are not finished or were damaged "
            "afterwards: run the same command again"
        )
    return done


def _text_bytes(file: FileRange) -> int:
    """Estimate the bytes of text in a range of a file."""
    compressed = file.path.endswith((*COMPRESSED, ".parquet"))
    return (file.end - file.start) * (_EXPANSION if compressed else 1)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
