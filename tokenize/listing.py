"""The files a source names, wherever they lie, and the fixed parts they are worked on in."""

import hashlib
import importlib.util
import os
import re
import stat
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from datatrove.io import get_datafolder
from fsspec.utils import glob_translate

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import SourceConfig

# A part is what one task does and a restart repeats. Its size must not depend on how many tasks there are.
PART_BYTES = 64 << 20
_PART_FILES = 10_000
_ROWS = (
    ".jsonl",
    ".json",
    ".jsonl.gz",
    ".json.gz",
    ".jsonl.zst",
    ".json.zst",
    ".jsonl.bz2",
    ".jsonl.xz",
    ".parquet",
)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_HUB = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<rest>/.*)?"
)


@dataclass(frozen=True)
class FileRange:
    """The records of one file that begin in bytes [start, end); a compressed file is always whole."""

    path: str
    start: int
    end: int
    size: int
    version: str

    def to_dict(self) -> dict:
        return asdict(self)


def locate(source: SourceConfig) -> tuple[str, str]:
    """The folder a source names, a hub revision pinned to its commit, and the pattern of its files. Raises UserError."""
    glob = source.glob or {"rows": "**/*", "text": "**/*", "docstrings": "**/*.py"}[source.kind]
    if source.path == "stdlib":
        return sysconfig.get_path("stdlib"), glob
    if source.path.startswith("package:"):
        return _package_folder(source.path.removeprefix("package:")), glob
    if "://" in source.path:
        path = _pinned(source) if source.path.startswith("hf://") else source.path
        folder, _, name = path.rpartition("/")
        return (folder, name) if path.endswith(_ROWS) else (path, glob)
    folder = Path(os.path.abspath(source.path))
    if not folder.exists():
        raise UserError(
            f"data.source.path={source.path}: {folder} does not exist; name a folder or file of documents"
        )
    if folder.is_file():
        return str(folder.parent), folder.name
    try:
        os.listdir(folder)  # glob passes over what it may not read
    except PermissionError:
        raise UserError(
            f"data.source.path={source.path}: {folder} cannot be read; change its permissions"
        ) from None
    return str(folder), glob


def list_parts(source: SourceConfig, root: str, glob: str) -> list[list[FileRange]]:
    """The source's files, by name, cut into parts: large files into ranges, small ones gathered. Raises UserError where there is none."""
    files = _list_files(source, root, glob)
    if not files:
        raise UserError(
            f"data.source.path={source.path}: no file in {root} matches {glob} that data.source.kind={source.kind} reads; "
            "correct data.source.path or data.source.glob, or set data.source.kind=text for a tree of text files"
        )
    parts = []
    gathered = []
    size = 0
    for file in files:
        if file.size > PART_BYTES // 4:  # its parts stay the same when other files come or go
            parts += [[piece] for piece in _ranges(file, source.kind)]
            continue
        gathered.append(file)
        size += file.size
        # Cut where the name says so, not where a sum is reached: a file that changes moves no other part's edges.
        edge = hashlib.sha256(file.path.encode("utf-8", "surrogateescape")).digest()[0] < 32
        if (edge and size > PART_BYTES // 4) or size > PART_BYTES or len(gathered) == _PART_FILES:
            parts.append(gathered)
            gathered = []
            size = 0
    return [*parts, gathered] if gathered else parts


def _ranges(file: FileRange, kind: str) -> list[FileRange]:
    whole = kind != "rows" or file.path.endswith(COMPRESSED)
    count = 1 if whole else -(-file.size // PART_BYTES)
    edges = [file.size * index // count for index in range(count + 1)]
    return [
        FileRange(file.path, start, end, file.size, file.version)
        for start, end in zip(edges, edges[1:])
    ]


def _list_files(source: SourceConfig, root: str, glob: str) -> list[FileRange]:
    try:
        found = get_datafolder(root).glob(glob, detail=True) if "://" in root else _walk(root, glob)
    except FileNotFoundError as error:
        if error.filename is None:  # an empty remote folder
            found = {}
        else:
            raise UserError(
                f"data.source.path={source.path}: {error.filename} leads nowhere; mend the link or remove it"
            ) from None
    except PermissionError as error:
        raise UserError(
            f"data.source.path={source.path}: {error}; change its permissions, or check the credentials"
        ) from None
    files = []
    for path, info in sorted(found.items()):
        excluded = not set(source.exclude).isdisjoint(PurePosixPath(path).parts)
        named = source.kind != "rows" or source.glob or glob != "**/*" or path.endswith(_ROWS)
        if info["type"] == "file" and named and not excluded:
            version = next(
                (
                    str(info[key])
                    for key in ("ETag", "etag", "blob_id", "mtime", "LastModified")
                    if info.get(key)
                ),
                "",
            )
            files.append(FileRange(path, 0, info["size"], info["size"], version))
    return files


def _walk(root: str, glob: str) -> dict[str, dict]:
    """The files below a local folder that match, links followed: fsspec passes over links, and over folders it may not list."""
    if (Path(root) / glob).is_file():
        names = [glob]
    else:
        pattern = re.compile(glob_translate(glob))
        names = []
        seen = set()

        def refuse(error: OSError):
            raise error

        for folder, folders, found in os.walk(root, onerror=refuse, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(real)
            names += [
                name
                for file in found
                if pattern.match(name := os.path.relpath(os.path.join(folder, file), root))
            ]
    stats = {name: os.stat(os.path.join(root, name)) for name in names}
    return {
        name: {
            "type": "file" if stat.S_ISREG(found.st_mode) else "other",
            "size": found.st_size,
            "mtime": found.st_mtime,
        }
        for name, found in stats.items()
    }


def _pinned(source: SourceConfig) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match = _HUB.fullmatch(source.path)
    if not match:
        raise UserError(
            f"data.source.path={source.path} is no hub path: write hf://datasets/OWNER/NAME/FOLDER"
        )
    kind = "dataset" if match["kind"] else "model"
    try:
        commit = (
            HfApi()
            .repo_info(match["name"], repo_type=kind, revision=match["revision"] or source.revision)
            .sha
        )
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"data.source.path={source.path}: revision {match['revision'] or source.revision} cannot be had from the hub "
            f"({str(error).splitlines()[0]}); check the name, the revision and HF_TOKEN, or set data.source.path to a local copy"
        ) from None
    return f"hf://{match['kind'] or ''}{match['name']}@{commit}{match['rest'] or ''}"


def _package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.source.path=package:{name}: no installed package has that name; install it or name a folder"
        )
    return str(next(iter(spec.submodule_search_locations)))
