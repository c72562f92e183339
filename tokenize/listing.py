"""The files of a source, local or remote, and their division into fixed parts."""

import hashlib
import importlib.util
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from datatrove.io import get_datafolder
from fsspec.utils import glob_translate

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import SourceConfig

# A part is the work that one task does at once and that a restart repeats. Its size must not depend
# on the number of tasks.
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
# Folders that tools fill by themselves, with compiled or downloaded copies.
_CACHES = {"__pycache__", "node_modules"}
_HUB = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<rest>/.*)?"
)


@dataclass(frozen=True)
class FileRange:
    """The records of one file that begin in bytes [start, end).

    A compressed file is never divided.
    """

    path: str
    start: int
    end: int
    size: int
    version: str

    def to_dict(self) -> dict:
        """Return the fields as a dict."""
        return asdict(self)


def locate(source: SourceConfig) -> tuple[str, str]:
    """Return the folder of a source and the pattern of its files.

    The revision of a hub source is pinned to its commit.

    Raises:
        UserError: The folder does not exist or cannot be read, or the hub does not provide it.
    """
    glob = source.glob or {"rows": "**/*", "text": "**/*", "docstrings": "**/*.py"}[source.kind]
    if source.path == "stdlib":
        return sysconfig.get_path("stdlib"), glob
    if source.path.startswith("package:"):
        return _package_folder(source.path.removeprefix("package:")), glob
    if "://" in source.path:
        path = _pinned(source) if source.path.startswith("hf://") else source.path
        parent, _, name = path.rpartition("/")
        return (parent, name) if path.endswith(_ROWS) else (path, glob)
    folder = Path(os.path.abspath(source.path))
    if not folder.exists():
        raise UserError(
            f"data.source.path={source.path}: {folder} does not exist; "
            "name a folder or file of documents"
        )
    if folder.is_file():
        return str(folder.parent), folder.name
    try:
        os.listdir(folder)  # glob skips what it has no permission to read
    except PermissionError:
        raise UserError(
            f"data.source.path={source.path}: {folder} cannot be read; change its permissions"
        ) from None
    return str(folder), glob


def list_parts(
    source: SourceConfig, root: str, glob: str
) -> tuple[list[list[FileRange]], dict[str, int]]:
    """List the files of a source by name and divide them into parts.

    Large files are divided into ranges, and small files are grouped.

    Args:
        source: The source.
        root: Its folder, from `locate`.
        glob: The pattern of its files, from `locate`.

    Returns:
        The parts, and how many files that match were left out, by reason: "hidden" or "cache".

    Raises:
        UserError: No file matches, or files cannot be listed.
    """
    files, left_out = _list_files(source, root, glob)
    if not files:
        taken = "; data.source.include_hidden=true takes hidden files and caches"
        raise UserError(
            f"data.source.path={source.path}: no file in {root} matches {glob} and can be read as "
            f"data.source.kind={source.kind}; correct data.source.path or data.source.glob, "
            f"or set data.source.kind=text for a tree of text files{taken if left_out else ''}"
        )
    parts = []
    group = []
    size = 0
    for file in files:
        # The parts of a large file do not change when other files are added or removed.
        if file.size > PART_BYTES // 4:
            parts += [[piece] for piece in _ranges(file, source.kind)]
            continue
        group.append(file)
        size += file.size
        # Groups end at a hash of the file name rather than at a total size, so that a changed file
        # does not move the edges of other parts.
        edge = hashlib.sha256(file.path.encode("utf-8", "surrogateescape")).digest()[0] < 32
        if (edge and size > PART_BYTES // 4) or size > PART_BYTES or len(group) == _PART_FILES:
            parts.append(group)
            group = []
            size = 0
    return [*parts, group] if group else parts, dict(left_out)


def _ranges(file: FileRange, kind: str) -> list[FileRange]:
    whole = kind != "rows" or file.path.endswith(COMPRESSED)
    count = 1 if whole else -(-file.size // PART_BYTES)
    edges = [file.size * index // count for index in range(count + 1)]
    return [
        FileRange(file.path, start, end, file.size, file.version)
        for start, end in zip(edges, edges[1:])
    ]


def _list_files(source: SourceConfig, root: str, glob: str) -> tuple[list[FileRange], Counter[str]]:
    # A pattern that names hidden files or caches asks for them.
    takes_all = source.include_hidden or _hidden_or_cache(glob)
    reason_of = _nothing if takes_all else _hidden_or_cache
    try:
        found = (
            get_datafolder(root).glob(glob, detail=True)
            if "://" in root
            else dict.fromkeys(_walk(root, glob, reason_of))
        )
        wanted = [path for path in sorted(found) if _is_readable(source, glob, path)]
        kept = [path for path in wanted if not reason_of(path)]
        infos = {path: found[path] or _local_info(root, path) for path in kept}
    except FileNotFoundError as error:
        if error.filename is None:  # an empty remote folder
            return [], Counter()
        raise UserError(
            f"data.source.path={source.path}: {error.filename} is a dangling link; "
            "correct the link or remove it"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"data.source.path={source.path}: {error}; "
            "change its permissions, or check the credentials"
        ) from None
    files = [
        FileRange(path, 0, info["size"], info["size"], _version(info))
        for path, info in infos.items()
        if info["type"] == "file"
    ]
    return files, Counter(reason for path in wanted if (reason := reason_of(path)))


def _is_readable(source: SourceConfig, glob: str, path: str) -> bool:
    """Return whether a file is of the kind of the source and not excluded by its name."""
    excluded = not set(source.exclude).isdisjoint(PurePosixPath(path).parts)
    of_kind = source.kind != "rows" or source.glob or glob != "**/*" or path.endswith(_ROWS)
    return bool(of_kind) and not excluded


def _hidden_or_cache(path: str) -> str | None:
    """Return why a file is left out by default: "hidden" or "cache", or None."""
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") for part in parts):
        return "hidden"
    return None if _CACHES.isdisjoint(parts) else "cache"


def _nothing(path: str) -> None:
    """Leave out no file."""


def _version(info: dict) -> str:
    keys = ("ETag", "etag", "blob_id", "mtime", "LastModified")
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _walk(root: str, glob: str, reason_of: Callable[[str], str | None]) -> list[str]:
    """Return the paths of the files below a local folder that match a pattern, following links.

    fsspec's glob ignores links, and folders that it has no permission to list.
    """
    if (Path(root) / glob).is_file():
        return [glob]
    pattern = re.compile(glob_translate(glob))
    names: list[str] = []
    # A folder that is reached by a hidden link, too, is not left out.
    seen: dict[str | None, set[str]] = {}

    def refuse(error: OSError) -> None:
        if not reason_of(os.path.relpath(error.filename, root)):
            raise error

    for folder, folders, filenames in os.walk(root, onerror=refuse, followlinks=True):
        known = seen.setdefault(reason_of(os.path.relpath(folder, root)), set())
        if (real := os.path.realpath(folder)) in known:  # for example a link to a parent folder
            folders.clear()
            continue
        known.add(real)
        names += [
            name
            for file in filenames
            if pattern.match(name := os.path.relpath(os.path.join(folder, file), root))
        ]
    return names


def _local_info(root: str, path: str) -> dict:
    status = os.stat(os.path.join(root, path))
    kind = "file" if stat.S_ISREG(status.st_mode) else "other"
    return {"type": kind, "size": status.st_size, "mtime": status.st_mtime}


def _pinned(source: SourceConfig) -> str:
    """Return the path of a hub source with its revision replaced by the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    match = _HUB.fullmatch(source.path)
    if not match:
        raise UserError(
            f"data.source.path={source.path} is not a hub path: "
            "write hf://datasets/OWNER/NAME/FOLDER"
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
            f"data.source.path={source.path}: the hub does not provide revision "
            f"{match['revision'] or source.revision} ({str(error).splitlines()[0]}); check the "
            "name, the revision and HF_TOKEN, or set data.source.path to a local copy"
        ) from None
    return f"hf://{match['kind'] or ''}{match['name']}@{commit}{match['rest'] or ''}"


def _package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.source.path=package:{name}: no installed package has that name; "
            "install it or name a folder"
        )
    return str(next(iter(spec.submodule_search_locations)))
