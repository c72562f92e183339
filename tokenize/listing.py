"""The files a source names, wherever they lie, and the fixed parts they are worked on in."""

import importlib.util
import os
import re
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from datatrove.io import get_datafolder

from retemper.pipeline.config import SourceConfig
from retemper.pipeline.errors import UserError

# A part is what one task does and a restart repeats. Its size must not depend on how many tasks there are.
PART_BYTES = 64 << 20
_ROWS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_HUB = re.compile(r"hf://(?P<kind>datasets/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<rest>/.*)?")


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
    folder = Path(source.path)
    if not folder.exists():
        raise UserError(f"data.source.path={source.path}: {folder} does not exist; name a folder or file of documents")
    if folder.is_file():
        return str(folder.parent), folder.name
    try:
        os.listdir(folder)  # glob passes over what it may not read
    except PermissionError:
        raise UserError(f"data.source.path={source.path}: {folder} cannot be read; change its permissions") from None
    return str(folder), glob


def list_parts(source: SourceConfig, root: str, glob: str) -> list[list[FileRange]]:
    """The source's files, by name, cut into parts: large files into ranges, small ones gathered. Raises UserError where there is none."""
    files = _list_files(source, root, glob)
    if not files:
        raise UserError(
            f"data.source.path={source.path}: no file in {root} matches {glob} (data.source.glob); correct the path or the pattern"
        )
    parts, gathered = [], []
    for file in files:
        if file.size > PART_BYTES // 4:  # its parts stay the same when other files come or go
            parts += [[piece] for piece in _ranges(file, source.kind)]
        else:
            if sum(piece.size for piece in gathered) + file.size > PART_BYTES:
                parts.append(gathered)
                gathered = []
            gathered.append(file)
    return [*parts, gathered] if gathered else parts


def _ranges(file: FileRange, kind: str) -> list[FileRange]:
    whole = kind != "rows" or file.path.endswith(_COMPRESSED)
    count = 1 if whole else -(-file.size // PART_BYTES)
    edges = [file.size * index // count for index in range(count + 1)]
    return [FileRange(file.path, start, end, file.size, file.version) for start, end in zip(edges, edges[1:])]


def _list_files(source: SourceConfig, root: str, glob: str) -> list[FileRange]:
    folder = get_datafolder(root)
    try:
        found = folder.glob(glob, detail=True)
    except FileNotFoundError:
        found = {}
    except PermissionError as error:
        raise UserError(f"data.source.path={source.path}: {error}; check permissions and credentials") from None
    files = []
    for path, info in sorted(found.items()):
        excluded = not set(source.exclude).isdisjoint(PurePosixPath(path).parts)
        named = source.kind != "rows" or source.glob or glob != "**/*" or path.endswith(_ROWS)
        if info["type"] == "file" and named and not excluded:
            version = next((str(info[key]) for key in ("ETag", "etag", "blob_id", "mtime", "LastModified") if info.get(key)), "")
            files.append(FileRange(path, 0, info["size"], info["size"], version))
    return files


def _pinned(source: SourceConfig) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match = _HUB.fullmatch(source.path)
    if not match:
        raise UserError(f"data.source.path={source.path} is no hub path: write hf://datasets/OWNER/NAME/FOLDER")
    kind = "dataset" if match["kind"] else "model"
    try:
        commit = HfApi().repo_info(match["name"], repo_type=kind, revision=match["revision"] or source.revision).sha
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"data.source.path={source.path}: revision {match['revision'] or source.revision} cannot be had from the hub "
            f"({str(error).splitlines()[0]}); check the name, the revision and HF_TOKEN, or set data.source.path to a local copy"
        ) from None
    return f"hf://{match['kind'] or ''}{match['name']}@{commit}{match['rest'] or ''}"


def _package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source.path=package:{name}: no installed package has that name; install it or name a folder")
    return str(next(iter(spec.submodule_search_locations)))
