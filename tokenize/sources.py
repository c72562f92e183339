"""Reading of source files: every record is a document or is counted as dropped, with the reason."""

import ast
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseDiskReader
from loguru import logger

from retemper.pipeline.schema.data import SourceConfig
from retemper.tokenize.json_records import MAX_RECORD_BYTES, UTF16, Damaged, json_records
from retemper.tokenize.listing import FileRange, list_parts, locate

if TYPE_CHECKING:
    import pyarrow as pa

# datatrove logs every file that it opens; the progress bar and the counts in the manifest suffice.
logger.disable("datatrove")

_PARQUET_ROWS = 64
_CONTROL = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_COLUMN = re.compile(r"\{(\w+)\}")


class Rejected(Exception):
    """A record is not a document; the message is the reason, in one word."""


class DocumentReader(BaseDiskReader):
    """A reader of the documents of one part, as datatrove documents.

    It counts `read` records and `dropped_<reason>`. A damaged file is listed in `broken`, and only
    its records after the damage are lost.

    Metadata of a document: file (index in the part), position (byte offset of the line, or number
    of the row or element), prompt_chars (characters of the prompt), about (the values of
    metadata_keys).
    """

    name = "📖 Documents"

    def __init__(self, source: SourceConfig, root: str, *, replace_invalid: bool = False):
        super().__init__(root)
        self.source = source
        self.replace_invalid = replace_invalid
        self.columns = [
            *dict.fromkeys(
                [source.text_key, *_COLUMN.findall(source.prompt or ""), *source.metadata_keys]
            )
        ]
        self.broken: list[dict] = []

    def read_part(self, part: list[FileRange]) -> DocumentsPipeline:
        """Yield the documents of all files of a part, in order."""
        for number, file in enumerate(part):
            read = 0
            try:
                for position, record in self._records(file):
                    read += 1
                    try:
                        document = self._document(record, file.path, number, position)
                    except Rejected as reason:
                        self.stat_update(f"dropped_{reason}")
                        continue
                    del record  # free a large line; the document has its text
                    yield document
            except Exception as error:
                if not _is_damage(error):
                    raise
                self.broken.append(
                    {
                        "file": self.data_folder.resolve_paths(file.path),
                        "error": str(error),
                        "records_read": read,
                    }
                )
            if read:
                self.stat_update("read", value=read, unit="file")

    def read_file(self, filepath: str) -> DocumentsPipeline:
        """Read a whole file; datatrove's readers must have this method."""
        size = self.data_folder.size(filepath)
        return self.read_part([FileRange(filepath, 0, size, size, "")])

    def _records(self, file: FileRange) -> Iterator[tuple[int, object]]:
        """Yield (position, record): a dict, or the bytes of a text file or of a JSON line."""
        if self.source.kind != "rows":
            with self.data_folder.open(file.path, "rb") as stream:
                yield 0, stream.read(MAX_RECORD_BYTES + 1)
        elif file.path.endswith(".parquet"):
            with self.data_folder.open(file.path, "rb") as stream:
                yield from self._parquet_rows(stream, file)
        else:
            yield from json_records(self.data_folder, file)

    def _parquet_rows(self, stream: BinaryIO, file: FileRange) -> Iterator[tuple[int, dict]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(stream) as parquet:
            columns = [name for name in self.columns if name in parquet.schema_arrow.names]
            row = 0
            for group in range(parquet.num_row_groups):
                layout = parquet.metadata.row_group(group)
                chunk = layout.column(0)
                start = min(
                    chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset
                )
                if file.start <= start < file.end:
                    batches = parquet.iter_batches(
                        _PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False
                    )
                    yield from enumerate(_batch_rows(batches, columns, layout.num_rows), row)
                row += layout.num_rows

    def _document(self, record: object, path: str, number: int, position: int) -> Document:
        if isinstance(record, bytes):
            if len(record) > MAX_RECORD_BYTES:
                raise Rejected("too_large")
            record = self._parsed(record) if self.source.kind == "rows" else self._extracted(record)
        if not isinstance(record, dict) or record.get(self.source.text_key) is None:
            raise Rejected("no_text")
        prompt = _COLUMN.sub(
            lambda match: self._text(record.get(match[1])), self.source.prompt or ""
        )
        text = self._text(record[self.source.text_key])
        about = {key: record.get(key) for key in self.source.metadata_keys}
        metadata = {
            "file": number,
            "position": position,
            "prompt_chars": len(prompt),
            "about": about,
        }
        return Document(prompt + text, f"{path}:{position}", metadata=metadata)

    def _text(self, value: object) -> str:
        if isinstance(value, bytes):
            return self._decoded(value)
        if not isinstance(value, str):
            raise Rejected("no_text" if value is None else "not_text")
        return value

    def _parsed(self, line: bytes) -> object:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
        # The standard library also accepts what orjson refuses without telling the reason: NaN,
        # lone surrogates, and numbers that are too large, which are no text either way.
        try:
            row = json.loads(self._decoded(line), parse_int=float)
        except (ValueError, RecursionError):
            raise Rejected("malformed_json") from None
        return (
            {key: self._without_surrogates(row.get(key)) for key in self.columns}
            if isinstance(row, dict)
            else row
        )

    def _without_surrogates(self, value: object) -> object:
        if not isinstance(value, str) or not _SURROGATE.search(value):
            return value
        if not self.replace_invalid:
            raise Rejected("lone_surrogate")
        return _SURROGATE.sub("\ufffd", value)

    def _extracted(self, content: bytes) -> dict:
        if content.startswith(UTF16):
            raise Rejected("utf16")
        if _is_binary(content):
            raise Rejected("binary")
        text = self._decoded(content.removeprefix(codecs.BOM_UTF8))
        if self.source.kind == "docstrings":
            try:
                text = _docstrings(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                raise Rejected("not_python") from None
        return {self.source.text_key: self._without_surrogates(text)}

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8", "replace" if self.replace_invalid else "strict")
        except UnicodeDecodeError:
            raise Rejected("invalid_utf8") from None


def prompt_wording(source: SourceConfig) -> list[str]:
    """Return the constant parts of data.source.prompt, which all documents share."""
    return _COLUMN.split(source.prompt or "")[::2]


def read_documents(source: SourceConfig, *, every: int = 1) -> Iterator[Document]:
    """Yield the documents of every n-th file of a source, in order, before any cleaning."""
    root, glob = locate(source)
    parts, _left_out = list_parts(source, root, glob)
    files = [file for part in parts for file in part]
    reader = DocumentReader(source, root)
    for file in files[::every]:
        yield from reader.read_part([file])


def _batch_rows(
    batches: Iterable["pa.RecordBatch"], columns: list[str], num_rows: int
) -> Iterator[dict]:
    """Yield the rows of a row group.

    Strings are bytes, so that invalid UTF-8 in one row does not affect other rows.
    """
    if not columns:
        yield from ({} for _ in range(num_rows))
    for batch in batches:
        for values in zip(*map(_values, batch.columns), strict=True):
            yield dict(zip(columns, values))


def _values(column: "pa.Array") -> list:
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(kind).cast(pa.large_binary())
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # within a nested column, which is not text anyway
        return [{}] * len(column)


def _is_damage(error: Exception) -> bool:
    """Return whether the error is due to a file's content, not the disk, network or program."""
    import pyarrow as pa

    if isinstance(
        error,
        (
            Damaged,
            EOFError,
            UnicodeDecodeError,
            zlib.error,
            lzma.LZMAError,
            gzip.BadGzipFile,
            pa.ArrowException,
        ),
    ):
        return True
    return type(error) is OSError and error.errno is None  # bz2 and Arrow's decompressors


def _is_binary(content: bytes) -> bool:
    """Return whether control characters that text does not use are more than one in a hundred.

    In compressed data they are one in ten; texts in old encodings, as Latin-1, have none.
    """
    others = content.translate(None, delete=_CONTROL)
    return 100 * (len(content) - len(others)) > len(content)


def _docstrings(text: str) -> str:
    """Return the docstrings of Python code, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
    ordered = sorted(nodes, key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(docstring for node in ordered if (docstring := ast.get_docstring(node)))
