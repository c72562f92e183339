"""What a job will do, on disk: its settings, its parts and buckets, and which of them are done.

work/plan.json            settings, source, encoder, the parts in order
work/parts/<id>/          one part of the source: inputs.json, the spool, done.json
work/buckets/<id>.json    a bucket's counts, written after its shards
work/out/                 the corpus to be

A part's id is the hash of its inputs and of the settings, so that a finished part is found again or not at all.
"""

import contextlib
import hashlib
import json
import os
import shutil
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_file
from retemper.tokenize.listing import COMPRESSED, FileRange

# Raised when the same inputs and settings give other bytes than before.
FORMAT = 1
# Bytes of documents in a bucket: it is packed by one task, in memory but for the tokens.
_BUCKET_BYTES = 256 << 20
# Text a compressed file holds for each of its bytes, about; a bucket may be twice the size and nothing breaks.
_EXPANSION = 4


@dataclass(frozen=True)
class Plan:
    """One job."""

    made_from: dict
    root: str
    encoder: dict
    parts: list[str]
    buckets: dict[str, int]
    source_files: int
    source_bytes: int
    near_duplicates: str = "keep"  # data.near_duplicates; plans from before that key have none

    def save(self, work: Path) -> None:
        replace_file(work / "plan.json", json.dumps(asdict(self), indent=1))

    @property
    def bucket_ids(self) -> list[tuple[str, int]]:
        """(split, number) of every bucket; tasks of the write stage take them in this order."""
        return [(split, number) for split, count in self.buckets.items() for number in range(count)]

    def bucket_fingerprint(self, split: str, number: int, limit: int | None) -> str:
        """Of everything that a bucket's shards depend on; limit: the samples it may give, None for all."""
        return _hash([FORMAT, self.made_from, self.parts, self.buckets, split, number, limit])


def load_plan(work: Path) -> Plan:
    """The plan of a job that has one."""
    return Plan(**json.loads((work / "plan.json").read_text()))


def make_plan(
    work: Path,
    made_from: dict,
    root: str,
    encoder: dict,
    parts: list[list[FileRange]],
    *,
    heldout_fraction: float,
    near_duplicates: str,
) -> Plan:
    """Write the plan and the inputs of its parts; parts that are done already keep their place by their id."""
    settings = {key: made_from[key] for key in made_from if key not in _PACKING_KEYS}
    if near_duplicates != "keep":
        settings["sketches"] = True
    ids = []
    for part in parts:
        inputs = [file.to_dict() for file in part]
        ids.append(_hash([FORMAT, settings, inputs])[:24])
        if not (path := part_folder(work, ids[-1]) / "inputs.json").is_file():
            replace_file(path, json.dumps(inputs))
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
    )
    plan.save(work)
    return plan


# What happens after the spool does not touch a part.
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
def told(work: Path):
    """Leave the reason of a failure in error.txt: what a task on another machine raises is not seen where the job was started."""
    try:
        yield
    except Exception as error:
        replace_file(
            work / "error.txt",
            str(error) if isinstance(error, UserError) else traceback.format_exc(),
        )
        raise


def take_error(work: Path) -> str | None:
    """The reason that a task left, which is then forgotten."""
    path = work / "error.txt"
    reason = path.read_text() if path.is_file() else None
    path.unlink(missing_ok=True)
    return reason


def remove(work: Path) -> None:
    """Delete a job's intermediate files."""
    shutil.rmtree(work, ignore_errors=True)


def part_folder(work: Path, part: str) -> Path:
    return work / "parts" / part


def part_inputs(work: Path, part: str) -> list[FileRange]:
    """The files of a part."""
    return [
        FileRange(**file)
        for file in json.loads((part_folder(work, part) / "inputs.json").read_text())
    ]


def read_done(marker: Path, folder: Path, fingerprint: str | None = None) -> dict | None:
    """A done-marker, or None where it is missing, was made from something else, or a file it lists is not as it was left."""
    try:
        done = json.loads(marker.read_text())
        intact = all((folder / name).stat().st_size == size for name, size in done["files"].items())
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return done if intact and done.get("fingerprint") == fingerprint else None


def write_done(marker: Path, folder: Path, done: dict) -> None:
    """Mark what stands in `folder` as finished, once it is on the disk; done["files"] gets the size of each of its files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != marker]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    replace_file(
        marker,
        json.dumps(
            {
                **done,
                "files": {str(path.relative_to(folder)): path.stat().st_size for path in paths},
            }
        ),
    )


def part_done(work: Path, part: str) -> dict | None:
    """The done-marker of a part whose spool stands whole."""
    return read_done(part_folder(work, part) / "done.json", part_folder(work, part))


def bucket_marker(work: Path, split: str, number: int) -> Path:
    return work / "buckets" / f"{split}-{number:05d}.json"


def bucket_folder(work: Path, split: str, number: int) -> Path:
    return work / "out" / split / f"{number:05d}"


def bucket_done(work: Path, plan: Plan, split: str, number: int) -> dict | None:
    """The done-marker of a bucket whose shards stand whole."""
    fingerprint = plan.bucket_fingerprint(split, number, read_limit(work, split, number))
    return read_done(
        bucket_marker(work, split, number), bucket_folder(work, split, number), fingerprint
    )


def write_limits(work: Path, limits: list[int | None]) -> None:
    """How many samples each training bucket may give."""
    replace_file(work / "chosen.json", json.dumps(limits))


def read_limit(work: Path, split: str, number: int) -> int | None:
    return json.loads((work / "chosen.json").read_text())[number] if split == TRAIN else None


def all_parts_done(work: Path, plan: Plan) -> list[dict]:
    """The markers of all parts, in order. Raises UserError where one is missing."""
    done = [part_done(work, part) for part in plan.parts]
    if missing := done.count(None):
        raise UserError(
            f"{missing} of {len(done)} parts in {work} are not finished or were damaged since: run the same command again"
        )
    return done


def _text_bytes(file: FileRange) -> int:
    compressed = file.path.endswith((*COMPRESSED, ".parquet"))
    return (file.end - file.start) * (_EXPANSION if compressed else 1)


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
