"""The records of a JSON file as bytes: its lines, or the elements of the one array that it is.

The parser of a record sees its bytes alone, so that a record with invalid UTF-8, NaN or a nesting
too deep costs only itself, in a line as in an array, and memory is that of the largest record.
"""

import codecs
import io
import re
from collections.abc import Buffer, Iterator

from datatrove.io import DataFolder

from retemper.tokenize.listing import COMPRESSED, FileRange

# A longer record is not a document: a line is skipped without being read into memory.
MAX_RECORD_BYTES = 1 << 28
_BUFFER_BYTES = 1 << 20
# The marks that files in UTF-16 begin with, and those in UTF-32 of the same byte order.
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A whole string, or a byte that gives an array its structure. A quote alone begins a string that
# the text at hand does not end.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)


class Damaged(ValueError):
    """A file cannot be read from here on; the message says why."""


def json_records(folder: DataFolder, file: FileRange) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of the records of a range of a JSON file.

    Args:
        folder: The folder of the file.
        file: The range. Of a file that is one array, the first range has all records.

    Returns:
        The byte offset of each line that is not blank, or the number of each element of an array.

    Raises:
        Damaged: The file is in UTF-16, or its array is damaged.
    """
    may_be_array = re.search(r"\.json(\.\w+)?$", file.path) is not None
    with _decompressed(folder, file.path) as stream:
        head = stream.peek() if may_be_array or not file.start else b""
        if head.startswith(UTF16):
            raise Damaged("it is in UTF-16: convert it to UTF-8")
        is_marked = head.startswith(codecs.BOM_UTF8)
        if is_marked:
            stream.read(len(codecs.BOM_UTF8))
        if may_be_array and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            if not file.start:
                yield from enumerate(_elements(stream))
            return
        position = len(codecs.BOM_UTF8) if is_marked else 0
        if file.start:
            stream.seek(file.start - 1)
            position = file.start - 1 + _skip_line(stream)
        yield from _lines(stream, position, file.end if file.end < file.size else None)


def _lines(
    stream: io.BufferedReader, position: int, end: int | None
) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line) of the lines that begin before `end`; the next is at `position`."""
    while end is None or position < end:
        line = [stream.readline(MAX_RECORD_BYTES + 1)]
        if not line[0]:
            return
        size = len(line[0])
        if size > MAX_RECORD_BYTES and not line[0].endswith(b"\n"):
            size += _skip_line(stream)
        if not line[0].isspace():
            yield position, line.pop()  # without a reference left here, so that it can be freed
        position += size


def _skip_line(stream: io.BufferedReader) -> int:
    """Skip the rest of a line and return its bytes."""
    size = 0
    while chunk := stream.readline(1 << 20):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _elements(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield the elements of the array that a stream contains.

    Of a string that spans pieces the beginning is looked at again, but each piece is as long as all
    that is kept, so that the time is linear.
    """
    kept = b""
    depth = begin = scanned = 0
    while piece := stream.read(max(_BUFFER_BYTES, len(kept))):
        kept += piece
        for token in _TOKEN.finditer(kept, scanned):
            scanned = token.start()
            if token[0] == b'"':
                break
            scanned = token.end()
            if not depth:  # the bracket that opens the array
                begin = scanned
            elif depth == 1 and token[0] in b",]":
                element = kept[begin : token.start()].strip()
                begin = scanned
                if element:
                    yield element
            depth += (token[0] in b"[{") - (token[0] in b"]}")
            if not depth:
                if kept[begin:].strip() or stream.read(_BUFFER_BYTES).strip():
                    raise Damaged("something follows the end of its array")
                return
        else:
            scanned = len(kept)
        kept = kept[begin:]
        scanned -= begin
        begin = 0
        if len(kept) > MAX_RECORD_BYTES:
            raise Damaged(f"an element of its array has more than {MAX_RECORD_BYTES:,} bytes")
    raise Damaged("its array has no end: the file is cut off")


def _decompressed(folder: DataFolder, path: str) -> io.BufferedReader:
    """Open a file as a stream of lines, decompressed by its suffix."""
    if path.endswith(".zst"):
        import pyarrow as pa

        # fsspec's zstd streams have no readline, and do not notice that a file is truncated.
        stream = pa.CompressedInputStream(folder.open(path, "rb"), "zstd")
    else:
        stream = folder.open(path, "rb", compression="infer")
    return io.BufferedReader(
        _Piecewise(stream) if path.endswith(COMPRESSED) else stream, _BUFFER_BYTES
    )


class _Piecewise(io.RawIOBase):
    """A decompressing stream that is read in pieces of what is available.

    Where a file is truncated, the data before the end is not lost with an incomplete buffer.
    """

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        piece = self._stream.read1(len(view))
        view[: len(piece)] = piece
        return len(piece)
