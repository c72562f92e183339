"""Test that gigatoken and tokenizers give the same ids.

A long document gets the ids of the whole text. Where gigatoken's ids differ, tokenizers is used.
"""

import json
import os
import shutil
import time

import numpy as np
import pytest
from conftest import data_config

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import SourceConfig
from retemper.tokenize import encoder as encoders
from retemper.tokenize.encoder import Encoder, choose_encoder, load_encoder
from retemper.tokenize.job import tokenize
from retemper.tokenize.sources import read_documents


@pytest.fixture(params=["trained", "llama"])
def tokenizer(request, workspace) -> Tokenizer:
    if request.param == "trained":
        return Tokenizer(workspace / "data" / "tokenizer")
    return Tokenizer(request.getfixturevalue("shared_data") / "llama2-tokenizer")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    import email

    source = SourceConfig(kind="text", path=email.__path__[0], glob="**/*.py")
    return [document.text for document in read_documents(source)]


def test_gigatoken_is_chosen_and_gives_the_same_ids_as_tokenizers(tokenizer, texts):
    assert choose_encoder(tokenizer, texts[:20]) | {"version": ""} == {
        "name": "gigatoken", "version": "",
        "equal_to_tokenizers_on": {"documents": 20, "strings": pytest.approx(290, abs=270)},
    }  # fmt: skip
    special = [f"it says {token} here" for token in ("<s>", "</s>", "<unk>", "<|endoftext|>")]
    ids = Encoder(tokenizer.folder, "gigatoken").encode(
        [text.encode() for text in [*texts, *special]]
    )
    assert [found.tolist() for found in ids] == tokenizer.encode([*texts, *special])


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_a_long_document_gets_the_ids_of_the_whole_text(tokenizer, texts, name, monkeypatch):
    long = (
        "".join(texts)
        + os.urandom(40_000).hex()
        + "x=1\n" * 9000
        + "".join(f"{text[:99]}🎉{' ' * 200}" for text in texts)
    ).encode()
    (whole,) = Encoder(tokenizer.folder, name).encode([long])
    monkeypatch.setattr(encoders, "_WINDOW_BYTES", 1 << 15)
    monkeypatch.setattr(encoders, "_OVERLAP_BYTES", 1 << 11)
    (ids,) = Encoder(tokenizer.folder, name).encode([long])
    assert len(long) > 12 << 15
    assert np.array_equal(ids, whole)


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_a_repetition_longer_than_the_overlap_is_cut_without_loss(tokenizer, name, monkeypatch):
    long = ("🎉" * 30_001 + " " * 90_001 + "a" * 90_001 + "é").encode()
    (whole,) = Encoder(tokenizer.folder, name).encode([long])
    monkeypatch.setattr(encoders, "_WINDOW_BYTES", 1 << 15)
    monkeypatch.setattr(encoders, "_OVERLAP_BYTES", 1 << 11)
    (ids,) = Encoder(tokenizer.folder, name).encode([long])
    assert tokenizer.backend.decode(ids.tolist()).encode() == long
    assert len(whole) <= len(ids) <= len(whole) + 2 * len(long) / (1 << 15)


def test_encoding_time_grows_linearly_with_length(shared_data):
    encoder = Encoder(shared_data / "llama2-tokenizer", "gigatoken")
    seconds = []
    for megabytes in (2, 8):
        started = time.process_time()
        encoder.encode([b"a" * (megabytes << 20)])  # a single word is the worst case
        seconds.append(time.process_time() - started)
    assert seconds[1] < 2 * 4 * seconds[0]  # four times the length, and a margin of two


def test_a_tokenizer_that_gigatoken_encodes_differently_falls_back_with_a_reason(
    shared_data, tmp_path, texts
):
    shutil.copytree(shared_data / "llama2-tokenizer", tmp_path / "changed")
    path = tmp_path / "changed" / "tokenizer.json"
    config = json.loads(path.read_text())
    config["normalizer"] = {
        "type": "Replace",
        "pattern": {"Regex": "import +"},
        "content": "export ",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "docs" / f"{number}.py").write_text(text)
    corpus = data_config(
        tmp_path,
        "fallback",
        "text",
        tmp_path / "docs",
        tokenizer=str(tmp_path / "changed"),
        tasks=1,
    )
    manifest = tokenize(corpus, progress=False)
    assert manifest["encoder"]["name"] == "tokenizers"
    assert "gigatoken" in manifest["encoder"]["reason"]


def test_a_tokenizer_that_changes_during_a_job_is_refused(workspace, tmp_path):
    tokenizer = Tokenizer(workspace / "data" / "tokenizer")
    with pytest.raises(UserError, match="changed while the job ran"):
        load_encoder(str(tokenizer.folder), "another hash", "gigatoken")
