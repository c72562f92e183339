"""Test that gigatoken and tokenizers give the same ids.

A long document gets the ids of the whole text. Where gigatoken's ids differ, tokenizers is used.
"""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import data_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

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
        "equal_to_tokenizers_on": {"documents": 20, "strings": pytest.approx(2000, abs=300)},
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


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
@pytest.mark.parametrize(
    "text",
    ["▁" * 30_001, "x▁" * 20_001, "▁ " * 20_001, "e\u0301 " * 20_001],
)
def test_a_long_text_of_other_bytes_than_its_tokens_gets_their_ids(
    tokenizer, name, text, monkeypatch
):
    monkeypatch.setattr(encoders, "_WINDOW_BYTES", 1 << 15)
    monkeypatch.setattr(encoders, "_OVERLAP_BYTES", 1 << 11)
    (ids,) = Encoder(tokenizer.folder, name).encode([text.encode()])
    assert ids.tolist() == tokenizer.encode([text])[0]


def composing(folder: Path, normalizer: normalizers.Normalizer) -> Tokenizer:
    """Train a tokenizer as Qwen 2 has: the word pattern, and by default the normalizer NFC."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated", invert=False)
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, spelling])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "café naïve Ångström 가나다 é ü ñ and words "
    backend.train_from_iterator([text] * 9, trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


MARKS = st.characters(categories=["Mn", "Mc"]) | st.sampled_from("\u0334\u0345\u0898\u1dfa")
PIECES = st.sampled_from("aeoA가\u1100\u1161\u11a8\u212b \n")
COMPOSED = st.text(MARKS | PIECES | st.characters(codec="utf-8"))


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(COMPOSED, max_size=9))
def test_ids_are_those_of_tokenizers_where_a_normalizer_composes(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp() / "composing"
    tokenizer = Tokenizer(folder) if folder.exists() else composing(folder, normalizers.NFC())
    ids = Encoder(folder, "gigatoken").encode([text.encode() for text in texts])
    assert [ids_of_text.tolist() for ids_of_text in ids] == tokenizer.encode(texts)


def test_the_manifest_says_which_encoder_was_used_and_why(tmp_path):
    choice = choose_encoder(composing(tmp_path / "nfc", normalizers.NFC()), ["text"])
    assert choice["name"] == "gigatoken"
    assert choice["texts_not_in_nfc"] == "tokenizers"
    for normalizer in (normalizers.NFD(), normalizers.NFKC(), normalizers.Lowercase()):
        choice = choose_encoder(composing(tmp_path / "other", normalizer), ["text"])
        assert choice["name"] == "tokenizers"
        assert "Unsupported normalizer" in choice["reason"]


def test_strings_with_combining_marks_tell_versions_of_unicode_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders.unicodedata, "is_normalized", lambda form, text: True)
    choice = choose_encoder(composing(tmp_path / "nfc", normalizers.NFC()), ["text"])
    assert choice["name"] == "tokenizers"
    assert "gigatoken gives other ids for 'a" in choice["reason"]


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
