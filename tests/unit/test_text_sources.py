"""Test what becomes a document of folders and files as people have them, and what is counted."""

import codecs
import gzip
import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DecontaminateConfig, SourceConfig
from retemper.tokenize import json_records, listing
from retemper.tokenize.decontaminate import Problems
from retemper.tokenize.job import tokenize
from retemper.tokenize.listing import list_parts, locate
from retemper.tokenize.sources import DocumentReader, read_documents

NOISE = random.Random(0).randbytes(4000)
DOCUMENTS = {f"doc{n}.md": f"# {n}\n" + f"words of document {n}, " * 30 for n in range(12)}
HIDDEN = {
    ".env": b"SECRET=abc\n" * 20,
    ".git/config": b"[core]\n\tbare = false\n",
    ".git/objects/ab/cd": zlib.compress(NOISE),
    "sub/.ipynb_checkpoints/copy.md": DOCUMENTS["doc0.md"].encode() + b"x",
    "sub/.notes.md.swp": b"b0VIM 9.0\0\0\0\0" + NOISE,
}
CACHES = {"__pycache__/a.pyc": NOISE, "node_modules/left-pad/index.js": b"module.exports = pad\n"}
BINARIES = {
    "picture.png": b"\x89PNG\r\n\x1a\n" + NOISE,
    "paper.pdf": b"%PDF-1.4\n" + b"1 0 obj << /Type /Page >> endobj\n" * 40 + zlib.compress(NOISE),
    "core": Path("/bin/true").read_bytes(),
    "wide.txt": "text in UTF-16 without a mark".encode("utf-16-le"),
}


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(path: Path, **source) -> list[str]:
    config = SourceConfig.model_validate({"kind": "text", "path": str(path)} | source)
    return [document.text for document in read_documents(config)]


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = write(tmp_path / "repository", DOCUMENTS | HIDDEN | CACHES | BINARIES)
    (folder / ".#doc1.md").symlink_to("user@host.1234")  # an editor's lock: a dangling link
    (folder / ".docs").symlink_to(folder)  # is not to hide the documents
    (folder / "windows.txt").write_text("saved as Unicode by Notepad", encoding="utf-16")
    (folder / "latin.txt").write_bytes("déjà vu à la carte".encode("latin-1"))
    return folder


@pytest.mark.parametrize("invalid_utf8", ["drop", "replace"])
def test_hidden_files_caches_and_binaries_are_no_documents_and_are_counted(
    workspace, repository, tmp_path, invalid_utf8
):
    corpus = data_config(
        workspace,
        "mixed",
        path=str(tmp_path / "out"),
        source={"kind": "text", "path": str(repository)},
        clean={"invalid_utf8": invalid_utf8},
        heldout_fraction=0.0,
        tasks=1,
    )
    manifest = tokenize(corpus, progress=False)
    latin = invalid_utf8 == "replace"
    kept = manifest["splits"]["train"]["documents"] + manifest["dropped"].pop("tail", 0)
    assert kept == len(DOCUMENTS) + latin
    expected = {
        "hidden": manifest["dropped"]["hidden"], "cache": len(CACHES), "binary": len(BINARIES),
        "utf16": 1, "invalid_utf8": 1 - latin,
    }  # fmt: skip
    assert manifest["dropped"] == {reason: count for reason, count in expected.items() if count}
    # What lies behind a hidden link is counted once more.
    assert manifest["dropped"]["hidden"] > len(HIDDEN)
    assert manifest["documents_read"] == kept + sum(manifest["dropped"].values())
    plain = write(tmp_path / "plain", DOCUMENTS)
    assert texts(repository) == texts(plain), "a folder without them gives the same documents"


def test_hidden_files_are_read_on_request(repository, tmp_path):
    (repository / ".#doc1.md").unlink()
    (repository / ".docs").unlink()
    secret = HIDDEN[".env"].decode()
    assert secret in texts(repository, include_hidden=True)
    assert CACHES["node_modules/left-pad/index.js"].decode() in texts(
        repository, include_hidden=True
    )
    # A name or a pattern that says so is a request, too.
    assert texts(repository / ".env") == [secret]
    assert texts(repository, glob=".git/*") == [HIDDEN[".git/config"].decode()]
    assert texts(repository, glob="**/node_modules/**/*.js") == ["module.exports = pad\n"]
    # The folder itself may be hidden.
    hidden = repository.rename(tmp_path / ".hidden")
    assert texts(hidden, glob="**/*.md") == [DOCUMENTS[name] for name in sorted(DOCUMENTS)]


def test_a_folder_of_hidden_files_only_is_refused_with_the_key_that_takes_them(tmp_path):
    source = SourceConfig(kind="text", path=str(write(tmp_path / "home", HIDDEN)))
    with pytest.raises(UserError, match="data.source.include_hidden=true takes"):
        list_parts(source, *locate(source))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_hidden_folder_without_permission_does_not_matter(tmp_path):
    folder = write(tmp_path / "docs", DOCUMENTS | {".Trash/x.md": "x", "closed/x.md": "x"})
    (folder / ".Trash").chmod(0)
    (folder / "closed").chmod(0)
    try:
        with pytest.raises(UserError, match="closed"):
            texts(folder)
        (folder / "closed").chmod(0o700)
        assert len(texts(folder)) == len(DOCUMENTS) + 1
    finally:
        (folder / ".Trash").chmod(0o700)


def test_hidden_rows_are_left_out_as_well(tmp_path):
    rows = {"a.jsonl": '{"text": "seen"}\n', ".cache/huggingface/b.jsonl": '{"text": "hidden"}\n'}
    folder = write(tmp_path / "rows", rows | {".cache/c.lock": ""})
    assert texts(folder, kind="rows") == ["seen"]
    source = SourceConfig(kind="rows", path=str(folder))
    assert list_parts(source, *locate(source))[1] == {"hidden": 1}


@pytest.mark.parametrize(
    "text",
    [
        "", "\f form feed \x1b[31mcolour\x1b[0m \b\v", "emoji 🎉" * 9, "日本語",
        "a\0b" + "c" * 200,
        json.dumps({"nul": "\0"}),
    ],
)  # fmt: skip
def test_text_with_rare_characters_is_no_binary(tmp_path, text):
    assert texts(write(tmp_path / "docs", {"a.txt": text})) == [text]


ROWS = [
    {"text": f'row {n}: "quoted" \\ back, [x] {{y}} é 🎉\u2028', "n": [n, {"a": "]"}]}
    for n in range(9)
]
EXPECTED = [row["text"] for row in ROWS]


def records(folder: Path, name: str, content: bytes, **source) -> tuple[list[str], DocumentReader]:
    """Return the texts that are read of one file of rows, and the reader with its counts."""
    write(folder, {name: content})
    config = SourceConfig.model_validate({"kind": "rows", "path": str(folder)} | source)
    reader = DocumentReader(config, str(folder))
    return [document.text for document in reader.read_file(name)], reader


def dropped(reader: DocumentReader) -> dict[str, int]:
    return {
        name.removeprefix("dropped_"): int(metric.total)
        for name, metric in reader.stats.stats.items()
        if name.startswith("dropped_")
    }


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_elements_of_a_json_array_are_records(tmp_path, monkeypatch, suffix, indent, mark):
    monkeypatch.setattr(json_records, "_BUFFER_BYTES", 7)  # every token is cut somewhere
    content = mark + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\r\n "
    content = gzip.compress(content) if suffix.endswith(".gz") else content
    texts_of_file, reader = records(tmp_path, "rows" + suffix, content)
    assert texts_of_file == EXPECTED
    assert not reader.broken


def test_a_range_of_an_array_other_than_the_first_is_empty(tmp_path, monkeypatch):
    write(tmp_path, {"rows.json": json.dumps(ROWS)})
    monkeypatch.setattr(listing, "PART_BYTES", 100)
    source = SourceConfig(kind="rows", path=str(tmp_path))
    assert len(list_parts(source, *locate(source))[0]) > 5
    documents = list(read_documents(source))
    assert [document.text for document in documents] == EXPECTED
    assert [document.metadata["position"] for document in documents] == list(range(9))


def test_a_broken_element_of_an_array_costs_only_itself(tmp_path):
    elements = [
        b'{"text": "a", "n": NaN}', b'{"text": "caf\xe9"}', b'{"text": "lone \\ud800"}', b"7",
        b'{"text" "no colon"}', b'{"text": "b", "n": ' + b"9" * 5000 + b"}",
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"text": "c", "n": 1e999}',
    ]  # fmt: skip
    texts_of_file, reader = records(tmp_path, "rows.json", b"[" + b",".join(elements) + b"]")
    assert texts_of_file == ["a", "b", "c"]
    assert dropped(reader) == {
        "invalid_utf8": 1, "lone_surrogate": 1, "no_text": 1, "malformed_json": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b"", "has no end"),
        (b', {"text": "cut', "has no end"),
        (b', {"text": "cut\\', "has no end"),
        (b'] {"text": "more"}', "something follows"),
    ],
)
def test_a_damaged_array_keeps_the_records_before_the_damage(tmp_path, end, reason):
    content = json.dumps(ROWS).encode()[:-1] + end
    texts_of_file, reader = records(tmp_path, "rows.json", content)
    # Without its end it is not known whether the last element is whole.
    assert texts_of_file == EXPECTED[: 9 if end else 8]
    assert reason in reader.broken[0]["error"]


@pytest.mark.parametrize("content", [b"[]", b" [ ] ", b""])
def test_an_empty_array_has_no_records(tmp_path, content):
    texts_of_file, reader = records(tmp_path, "rows.json", content)
    assert (texts_of_file, reader.broken) == ([], [])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_byte_order_mark_does_not_lose_the_first_row(tmp_path, monkeypatch, name):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    content = codecs.BOM_UTF8 + b"\n".join(lines)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    assert records(tmp_path, name, compress(content))[0] == EXPECTED
    if compress is bytes:
        monkeypatch.setattr(listing, "PART_BYTES", 100)
        assert texts(tmp_path, kind="rows") == EXPECTED
        position = next(iter(read_documents(SourceConfig(kind="rows", path=str(tmp_path)))))
        assert position.metadata["position"] == len(codecs.BOM_UTF8)


def test_rows_with_numbers_of_any_size_are_kept(tmp_path):
    numbers = [b"9" * 5000, b"-" + b"9" * 5000, b"1e999", b"NaN", b"-Infinity"]
    lines = [b'{"text": "t", "n": %s, "m": {"deep": [%s]}}' % (n, n) for n in numbers]
    texts_of_file, reader = records(tmp_path, "rows.jsonl", b"\n".join(lines))
    assert (texts_of_file, dropped(reader)) == (["t"] * len(numbers), {})
    texts_of_file, reader = records(tmp_path, "number.jsonl", b'{"text": %s}' % numbers[0])
    assert (texts_of_file, dropped(reader)) == ([], {"not_text": 1})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_in_utf_16_are_refused_with_that_reason(tmp_path, encoding, name):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    content = mark + json.dumps(ROWS[0]).encode(encoding)
    texts_of_file, reader = records(tmp_path, name, content)
    assert texts_of_file == []
    assert "it is in UTF-16: convert it to UTF-8" in reader.broken[0]["error"]


def test_evaluation_problems_may_be_an_array_with_a_byte_order_mark(tmp_path):
    words = [" ".join(f"word{n}x{k}" for k in range(20)) for n in range(3)]
    content = codecs.BOM_UTF8 + json.dumps([{"question": text} for text in words]).encode()
    write(tmp_path, {"problems.json": content})
    tasks = {"own": str(tmp_path / "problems.json")}
    problems = Problems.read(DecontaminateConfig(tasks=tasks))
    assert problems.counts["own"]["problems"] == 3
    assert problems.match(words[2].encode())[0] == "own: 2"


SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9
)


@settings(deadline=None)
@given(
    rows=st.lists(VALUES),
    piece=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    is_ascii=st.booleans(),
)
def test_elements_are_those_of_the_whole_array(rows, piece, indent, is_ascii):
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_BUFFER_BYTES", piece)
        stream = io.BufferedReader(io.BytesIO(text.encode()))
        assert [*map(json.loads, json_records._elements(stream))] == rows


MARKS = [
    "<reponame>a/b<filename>c d/e.py<gh_stars>10-100\n", "<filename>x.py\n", "<gh_stars>1000+\n",
    "<reponame>a/b<gh_stars>0\n",
]  # fmt: skip
UNMARKED = [
    "import os\n", "<filename>of an element</filename>\n", "x = 1\n<gh_stars>0\n", "<reponame>\n",
]  # fmt: skip


@pytest.mark.parametrize("prompt", [None, "Write {id}:\n"])
def test_marks_of_starcoder_s_rows_are_counted_and_stripped_on_request(workspace, tmp_path, prompt):
    code = "def f():\n    return 1\n" * 9
    contents = [f"{first}{code}# {n}" for n, first in enumerate([*MARKS, *UNMARKED])]
    rows = [{"content": text, "id": "it"} for text in [*contents, MARKS[0], MARKS[0].strip()]]
    write(tmp_path, {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    source = {"kind": "rows", "path": str(tmp_path / "rows.jsonl"), "text_key": "content"}
    written = {}
    for action in ("keep", "strip"):
        corpus = data_config(
            workspace,
            "marked",
            path=str(tmp_path / action),
            source=source | {"prompt": prompt},
            clean={"repository_marks": action},
            packing="best_fit",
            seq_length=512,
            heldout_fraction=0.0,
            tasks=1,
        )
        manifest = tokenize(corpus, progress=False)
        marks = {"action": action, "documents": len(MARKS) + 2}
        assert manifest["repository_marks"] == marks
        shards, tokenizer = TokenShards(corpus.path, "train"), Tokenizer(corpus.tokenizer)
        decoded = [
            tokenizer.backend.decode(row.tolist())
            for row in shards.samples(np.arange(len(shards))).tokens_NT
        ]
        written[action] = "".join(decoded)
        kept = manifest["splits"]["train"]["documents"]
        # Nothing but marks is an empty document.
        assert manifest["dropped"] == ({} if action == "keep" else {"empty": 2})
        assert kept == len(rows) - 2 * (action == "strip")
    assert all(mark in written["keep"] for mark in MARKS)
    assert not any(mark in written["strip"] for mark in [MARKS[0], *MARKS[1:3]])
    assert all(text in written["strip"] for text in UNMARKED)


READ_AN_ARRAY = """
import json, sys
from retemper.pipeline.schema.data import SourceConfig
from retemper.tokenize.sources import read_documents

source = SourceConfig(kind="rows", path=sys.argv[1], text_key="response")
count = sum(len(document.text) > 0 for document in read_documents(source))
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(json.dumps([count, int(peak.split()[1]) << 10]))
"""


@pytest.mark.slow
def test_an_array_of_400_mb_is_read_in_less_than_200_mb(tmp_path):
    """Check the size of MetaMathQA-395K.json, 395,000 records in one array."""
    solutions = random.Random(0).choices('abcdefghij \\"\n', k=2000)
    with open(tmp_path / "MetaMathQA-395K.json", "w") as file:
        for number in range(395_000):
            at = number % 1000
            row = {"query": f"q{number}", "response": "".join(solutions[at : at + 900]), "n": None}
            file.write(("[" if not number else ",") + json.dumps(row, indent=4))
        file.write("]")
    assert (tmp_path / "MetaMathQA-395K.json").stat().st_size > 400e6
    command = [sys.executable, "-c", READ_AN_ARRAY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count, peak = json.loads(result.stdout)
    print(f"\n{count:,} records, {peak / 1e6:.0f} MB at most")
    assert count == 395_000
    assert peak < 200e6
