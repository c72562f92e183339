"""Documents in: datatrove readers for every kind of source a corpus names."""

import ast
import importlib.util
import os
import sysconfig
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from loguru import logger

from retemper.pipeline.config import SourceConfig
from retemper.pipeline.errors import UserError

# datatrove logs every file it opens; progress bars and the manifest's counts say what matters.
logger.disable("datatrove")


class TextReader(BaseDiskReader):
    """One document per text file. A file that is not UTF-8 is counted under `dropped_invalid_utf8` and left out."""

    name = "🗒 Text files"

    def __init__(self, *args, exclude: list[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.exclude = frozenset(exclude)

    def read_files_shard(self, shard: list[str]) -> DocumentsPipeline:
        return super().read_files_shard([path for path in shard if self.exclude.isdisjoint(Path(path).parts)])

    def read_file(self, filepath: str) -> DocumentsPipeline:
        with self.data_folder.open(filepath, "rb") as file:
            content = file.read()
        try:
            text = self.extract(content.decode("utf-8"))
        except UnicodeDecodeError:
            self.stat_update("dropped_invalid_utf8")
            return
        except (SyntaxError, ValueError):
            self.stat_update("dropped_not_python")
            return
        if text.strip():
            yield self.get_document_from_dict({"text": text, "id": filepath}, filepath, 0)
        else:
            self.stat_update("dropped_empty")

    def extract(self, text: str) -> str:
        """The document a file holds."""
        return text


class DocstringReader(TextReader):
    """One document per Python module: its docstrings, in source order. The module is parsed, never imported."""

    name = "🗒 Docstrings"

    def extract(self, text: str) -> str:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
        ordered = sorted(nodes, key=lambda node: getattr(node, "lineno", 0))
        return "\n\n".join(docstring for node in ordered if (docstring := ast.get_docstring(node)))


def build_reader(source: SourceConfig, *, progress: bool = False) -> BaseDiskReader:
    """The datatrove reader of one source. Raises UserError where no file matches."""
    folder, glob = locate(source)
    options = {"glob_pattern": glob, "file_progress": progress}
    if source.kind in ("jsonl", "parquet"):
        reader = JsonlReader if source.kind == "jsonl" else ParquetReader
        return reader(str(folder), text_key=source.text_key, **options)
    reader = TextReader if source.kind == "text" else DocstringReader
    return reader(str(folder), exclude=source.exclude, **options)


def locate(source: SourceConfig) -> tuple[Path, str]:
    """The folder a source names and the pattern of its files. Raises UserError where there is nothing to read."""
    if source.path == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
    elif source.path.startswith("package:"):
        folder = _package_folder(source.path.removeprefix("package:"))
    else:
        folder = Path(source.path)
    glob = source.glob
    try:
        if not folder.exists():
            raise UserError(f"data.source.path={source.path}: {folder} does not exist; name a folder or file of documents")
        if folder.is_file():
            folder, glob = folder.parent, folder.name
        os.listdir(folder)  # glob passes over what it may not read
        found = any(path.is_file() for path in folder.glob(glob))
    except PermissionError as error:
        raise UserError(f"data.source.path={source.path}: {error.filename} cannot be read; change its permissions") from None
    if not found:
        raise UserError(
            f"data.source.path={source.path}: no file in {folder} matches data.source.glob={glob}; correct the path or the pattern"
        )
    return folder, glob


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source.path=package:{name}: no installed package has that name; install it or name a folder")
    return Path(next(iter(spec.submodule_search_locations)))
