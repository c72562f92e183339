"""Test the path from documents to token shards and samples, on real text."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import SEQ_LENGTH, VOCAB_SIZE, data_config, overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.manifest import read_manifest
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.data.streams import check_corpora, decontaminated
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.sealed import dump_sealed
from retemper.tokenize.identify import split_of
from retemper.tokenize.job import tokenize
from retemper.tokenize.sources import read_documents


def decoded(workspace, corpus: str, split: str) -> str:
    """Return the text of all samples of a split, with its end-of-text tokens."""
    shards = TokenShards(workspace / "data" / corpus, split)
    tokenizer = Tokenizer(workspace / "data" / "tokenizer")
    return tokenizer.backend.decode(
        shards.samples(np.arange(len(shards))).tokens_NT.flatten().tolist(),
        skip_special_tokens=False,
    )


def test_shards_decode_to_the_documents(workspace):
    import email

    corpus = data_config(workspace, "code", "text", Path(email.__file__).parent)
    documents = [
        document.text for document in read_documents(corpus.source) if document.text.strip()
    ]
    for split in ("train", "heldout"):
        expected = {text for text in documents if split_of(text, 0.2) == split}
        *whole, last = decoded(workspace, "code", split).split("<|endoftext|>")
        assert set(whole) <= expected
        assert len(expected) - len(whole) <= 2
        assert not last or any(text.startswith(last) for text in expected)


def test_heldout_documents_are_not_in_the_training_shards(workspace):
    train = decoded(workspace, "math", "train")
    heldout = [
        text
        for text in decoded(workspace, "math", "heldout").split("<|endoftext|>")
        if len(text) > 200
    ]
    assert heldout
    assert not any(text in train for text in heldout)


def test_difficult_text_is_decoded_exactly(workspace, tmp_path):
    difficult = [
        "def f():\n\treturn 'tab'\r\n",
        "# 🎉 naïve ﷽\n" * 9,
        r"\frac{\partial^2 u}{\partial x^2} = \int_0^\infty e^{-x}\,dx" * 9,
    ]
    (tmp_path / "docs").mkdir()
    for index, text in enumerate(difficult):
        (tmp_path / "docs" / f"{index}.py").write_bytes(text.encode())
    corpus = data_config(
        workspace,
        "hard",
        "text",
        tmp_path / "docs",
        heldout_fraction=0.0,
        path=str(tmp_path / "hard"),
        packing="best_fit",
        seq_length=2048,
    )
    manifest = tokenize(corpus, progress=False)
    tokenizer = Tokenizer(corpus.tokenizer)
    shards = TokenShards(corpus.path, "train")
    ids = shards.samples(np.arange(len(shards))).tokens_NT.flatten().tolist()
    assert set(tokenizer.backend.decode(ids, skip_special_tokens=False).split("<|endoftext|>")) == {
        *difficult,
        "",
    }
    assert manifest["splits"]["train"]["bytes"] == sum(len(text.encode()) for text in difficult)


@pytest.mark.parametrize("which", ["trained", "llama"])
def test_token_bytes_add_up_to_the_bytes_of_the_text(workspace, request, which):
    tokenizer = Tokenizer(
        workspace / "data" / "tokenizer"
        if which == "trained"
        else request.getfixturevalue("shared_data") / "llama2-tokenizer"
    )
    text = "def f(x):\n\treturn x ** 2  # naïve 🎉\n" + r"\int_0^1 x\,dx" * 3
    (ids,) = tokenizer.encode([text])
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_the_counts_of_the_manifest_match_the_shards(workspace):
    manifest = json.loads((workspace / "data" / "math" / "manifest.json").read_text())
    assert manifest["vocab_size"] == VOCAB_SIZE
    assert manifest["seq_length"] == SEQ_LENGTH
    for split, counts in manifest["splits"].items():
        assert (
            len(TokenShards(workspace / "data" / "math", split))
            == counts["samples"]
            == counts["tokens"] // SEQ_LENGTH
            > 0
        )


def test_a_finished_corpus_is_kept_and_a_changed_config_is_refused(workspace):
    import sympy.core

    math = Path(sympy.core.__file__).parent
    modified = (workspace / "data" / "math" / "manifest.json").stat().st_mtime_ns
    tokenize(data_config(workspace, "math", "docstrings", math), progress=False)
    with pytest.raises(UserError, match="data.heldout_fraction: 0.2 -> 0.5"):
        tokenize(
            data_config(workspace, "math", "docstrings", math, heldout_fraction=0.5), progress=False
        )
    assert (workspace / "data" / "math" / "manifest.json").stat().st_mtime_ns == modified


def test_unusable_sources_are_refused_and_leave_no_files(workspace, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.py").write_text("x = 1\n")
    for source, message in (
        (tmp_path / "none", "does not exist"),
        (empty, "no file in"),
        (tmp_path / "short", "fill no sample"),
    ):
        corpus = data_config(
            workspace, "bad", "text", source, heldout_fraction=0.0, path=str(tmp_path / "out")
        )
        with pytest.raises(UserError, match=message):
            tokenize(corpus, progress=False)
        assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(
    os.geteuid() != 0,
    reason="only root can switch to an unprivileged user",
)
def test_an_unreadable_folder_is_named(workspace, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "a.py").write_text("x = 1\n" * 100)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    locked.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=f"{locked} cannot be read"):
            list(read_documents(data_config(workspace, "bad", "text", locked).source))
    finally:
        os.seteuid(0)


def test_a_corpus_that_does_not_fit_the_run_is_refused(workspace):
    for change, message in (
        ("model.vocab_size=200", f"has {VOCAB_SIZE} tokens, model.vocab_size is only 200"),
        ("data.seq_length=32", f"samples of {SEQ_LENGTH} tokens, data.seq_length is 32"),
        ("train.global_batch_size=100000", "fewer than one batch"),
        (f"data.path={workspace}", "holds no token corpus"),
    ):
        config = load_config(overrides(workspace, "x", change, "train.tokens=1B"))
        with pytest.raises(UserError, match=message):
            check_corpora(config)


def test_evaluations_are_flagged_by_the_decontamination_of_each_corpus(workspace, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    manifest = read_manifest(str(workspace / "data" / "math"))
    (clean / "manifest.json").write_text(
        dump_sealed(manifest | {"decontamination": {"tasks": {"humaneval": {"problems": 164}}}})
    )
    streams = [
        f"data.path={clean}",
        f"data.mixture.other.path={tmp_path / 'unread'}",
        "data.mixture.other.fraction=0.5",
    ]
    config = load_config(
        overrides(
            workspace,
            "flagged",
            *streams,
            "data.replay.fraction=0.1",
            f"data.replay.path={workspace / 'data' / 'code'}",
        )
    )
    assert decontaminated(config, "humaneval") == {"math": True, "other": None, "replay": False}
    assert decontaminated(config, "mbpp") == {"math": False, "other": None, "replay": False}
