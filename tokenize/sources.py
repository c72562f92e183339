"""Documents in: datatrove readers for every kind of source a corpus names."""

import ast
import gzip
import importlib.util
import json
import os
import sys
import sysconfig
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from loguru import logger

from retemper.pipeline.config import SourceConfig
from retemper.pipeline.errors import UserError

# datatrove logs every file it opens; progress bars and the manifest's counts say what matters.
logger.disable("datatrove")

_GLOBS = {"text": "**/*", "docstrings": "**/*.py", "jsonl": "**/*.jsonl*", "parquet": "**/*.parquet"}


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


class _CountingRows:
    """Rows whose text is missing, no string or empty are counted and left out."""

    def get_document_from_dict(self, data, source_file, id_in_file):
        text = data.get(self.text_key) if isinstance(data, dict) else None
        if not isinstance(text, str):
            self.stat_update("dropped_no_text")
        elif not text.strip():
            self.stat_update("dropped_empty")
        else:
            return super().get_document_from_dict(data, source_file, id_in_file)
        return None


class RowsReader(_CountingRows, ParquetReader):
    """One document per parquet row."""


class JsonLinesReader(_CountingRows, BaseDiskReader):
    """One document per line, plain or compressed. A line that is no JSON is counted; a file that breaks off is named."""

    name = "🗒 JSON lines"

    def read_file(self, filepath: str) -> DocumentsPipeline:
        try:
            with self.data_folder.open(filepath, "rb", compression="infer") as file:
                for number, line in enumerate(file):
                    try:
                        row = json.loads(line)
                    except ValueError:
                        self.stat_update("dropped_malformed_json")
                        continue
                    if document := self.get_document_from_dict(row, filepath, number):
                        yield document
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{self.data_folder.resolve_paths(filepath)} is damaged ({error}): fetch it again, or leave it out") from None


def build_reader(source: SourceConfig, *, progress: bool = False) -> BaseDiskReader:
    """The datatrove reader of one source. Raises UserError where no file matches."""
    folder, glob = locate(source)
    options = {"glob_pattern": glob, "file_progress": progress and sys.stderr.isatty()}
    if source.kind in ("jsonl", "parquet"):
        reader = JsonLinesReader if source.kind == "jsonl" else RowsReader
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
    glob = source.glob or _GLOBS[source.kind]
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
            f"data.source.path={source.path}: no file in {folder} matches {glob} (data.source.glob); correct the path or the pattern"
        )
    return folder, glob


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source.path=package:{name}: no installed package has that name; install it or name a folder")
    return Path(next(iter(spec.submodule_search_locations)))
