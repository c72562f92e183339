"""Test what becomes a document of folders and files as people have them, and what is counted."""

import json
import os
import random
import zlib
from pathlib import Path

import pytest
from conftest import data_config

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import SourceConfig
from retemper.tokenize.job import tokenize
from retemper.tokenize.listing import list_parts, locate
from retemper.tokenize.sources import read_documents

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
        "", "\f form feed \x1b[31mcolour\x1b[0m \b\v", "emoji 🎉" * 9, "日本語", "a\0b" + "c" * 200,
        json.dumps({"nul": "\0"}),
    ],
)  # fmt: skip
def test_text_with_rare_characters_is_no_binary(tmp_path, text):
    assert texts(write(tmp_path / "docs", {"a.txt": text})) == [text]
