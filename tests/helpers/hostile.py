"""Write a hostile corpus: thousands of records, many of them no documents; and what is expected."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

# (a JSON line, why it is dropped)
_BAD_LINES = [
    (b'{"text": null}', "no_text"),
    (b'{"other": "x"}', "no_text"),
    (b"[1, 2, 3]", "no_text"),
    (b"null", "no_text"),
    (b'{"text": 42}', "not_text"),
    (b'{"text": ["a", "list"]}', "not_text"),
    (b'{"text": {"deep": {"er": 1}}}', "not_text"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t "}', "empty"),
    (b'{"text": "before\\u0000after"}', "nul_bytes"),
    (b'{"text": "lone \\ud800 surrogate"}', "lone_surrogate"),
    (b'{"text": "\\udfff"}', "lone_surrogate"),
    (b'{"text": "caf\xe9 in latin-1"}', "invalid_utf8"),
    (b'{"text": "\xff\xfe\xfd"}', "invalid_utf8"),
    (b'{"text": "never closed', "malformed_json"),
    (b"{broken", "malformed_json"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_json"),
    (b"\x00\x01\x02\x03 binary", "malformed_json"),
]
_BAD_CELLS = [
    (None, "no_text"),
    ("", "empty"),
    ("  ", "empty"),
    ("a\0b", "nul_bytes"),
    (b"\xff\xfe", "invalid_utf8"),
    (b"caf\xe9", "invalid_utf8"),
]


def good_text(number: int) -> str:
    """Return a document unlike all others."""
    return f"# document {number}\r\ndef f{number}(x):\n\treturn x * {number}  # naïve 🎉\n" * (
        1 + number % 5
    )


def write_hostile_corpus(
    folder: Path, records: int, giant_bytes: int
) -> tuple[Counter, list[str], list[str]]:
    """Write about `records` records below `folder` in every format, good ones among bad ones.

    Returns:
        The number of records to be dropped for each reason, the good documents, and the names of
        the damaged files.
    """
    rng = random.Random(records)
    folder.mkdir(parents=True)
    dropped: Counter = Counter()
    good: list[str] = []
    share = records // 6

    def some_lines(count: int) -> bytes:
        lines = []
        for _ in range(count):
            if rng.random() < 0.5:
                line, reason = rng.choice(_BAD_LINES if rng.random() < 0.99 else _BAD_LINES[:16])
                if len(line) > 1000 and rng.random() < 0.9:
                    line, reason = _BAD_LINES[0]
                dropped[reason] += 1
            else:
                good.append(good_text(len(good)))
                line = json.dumps(
                    {"text": good[-1], "id": len(good), "extra": float("nan")}
                ).encode()
            lines.append(line)
        return b"\n".join(lines) + b"\n"

    (folder / "a.jsonl").write_bytes(some_lines(share))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(some_lines(share)))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(some_lines(share)))

    # The last lines of these are cut off: what can be read of them is known from reading them.
    for name, compress in (("cut.jsonl.gz", gzip.compress), ("cut.jsonl.zst", zstandard.compress)):
        (folder / name).write_bytes(
            compress(json.dumps({"text": f"lost with {name}"}).encode())[:-12]
        )
    (folder / "cut.parquet").write_bytes(b"PAR1 and then nothing that parquet knows")
    (folder / "empty.parquet").write_bytes(b"")

    cells = []
    for _ in range(share):
        if rng.random() < 0.5:
            cell, reason = rng.choice(_BAD_CELLS)
            dropped[reason] += 1
        else:
            good.append(good_text(len(good)))
            cell = good[-1]
        cells.append(cell.encode() if isinstance(cell, str) else cell)
    # Arrow does not check bytes that are declared as text, and neither does a writer of such files.
    text = pa.StringArray.from_buffers(len(cells), *_string_buffers(cells))
    nested = pa.array([[{"a": [[number]]}] for number in range(share)])
    pq.write_table(
        pa.table({"id": range(share), "nested": nested, "text": text}),
        folder / "d.parquet",
        row_group_size=max(1, share // 7),
    )
    pq.write_table(
        pa.table({"content": [f"in another column {number}" for number in range(share)]}),
        folder / "wrong_column.parquet",
    )
    dropped["no_text"] += share
    pq.write_table(pa.table({"text": list(range(share))}), folder / "numbers.parquet")
    dropped["not_text"] += share

    word = f"giant line of {giant_bytes} bytes without an end, "
    good.append(word * (giant_bytes // len(word)) + "🎉")
    (folder / "giant.jsonl").write_bytes(
        json.dumps({"text": "a neighbour before"}).encode()
        + b"\n"
        + json.dumps({"text": good[-1]}, ensure_ascii=False).encode()
        + b"\n"
        + json.dumps({"text": "a neighbour after"}).encode()
    )
    good += ["a neighbour before", "a neighbour after"]
    return dropped, good, ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet", "empty.parquet"]


def _string_buffers(cells: list[bytes | None]) -> tuple:
    import numpy as np

    ends = np.cumsum([0] + [len(cell or b"") for cell in cells]).astype(np.int32)
    validity = pa.array([cell is not None for cell in cells]).buffers()[1]
    return (
        pa.py_buffer(ends.tobytes()),
        pa.py_buffer(b"".join(cell or b"" for cell in cells)),
        validity,
    )
