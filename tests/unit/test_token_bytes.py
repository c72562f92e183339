"""Test that the bytes of tokens add up to the text, and which tokenizer a run records.

Tokens may have been added to the vocabulary.
"""

import heapq
from pathlib import Path

import pytest
from conftest import TINY
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus import tokenizer as tokenizers
from retemper.pipeline.corpus.tokenizer import Tokenizer, train_tokenizer
from retemper.pipeline.data.streams import check_corpora
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.sealed import dump_sealed

PYTHON = Path(heapq.__file__).read_text()
ADDED = [
    "<｜User｜>",
    "<tool>",
    "日本",
    "🙂",
    "        ",
    "<｜fim▁hole｜>",
    "\n\n",
    "▁",
    "ünïcode",
    "e\u0301",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """Return the folder of a byte-level BPE trained on Python."""
    folder = tmp_path_factory.mktemp("byte-level")
    train_tokenizer([PYTHON], 400, folder)
    return folder


def with_added(folder: Path, target: Path, tokens: list[AddedToken]) -> Tokenizer:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(tokens)
    target.mkdir()
    backend.save(str(target / "tokenizer.json"))
    return Tokenizer(target)


def counted(tokenizer: Tokenizer, text: str) -> int:
    (ids,) = tokenizer.encode([text])
    return int(tokenizer.token_bytes()[ids].sum())


@pytest.mark.parametrize("normalized", [False, True])
def test_bytes_of_added_tokens_add_up_to_the_text(byte_level, tmp_path, normalized):
    tokenizer = with_added(
        byte_level, tmp_path / "t", [AddedToken(token, normalized=normalized) for token in ADDED]
    )
    for text in (
        "".join(ADDED),
        "<｜User｜>print(1)<｜end｜> 日本語 naïve café 🙂🙂\r\n\n\tx",
        PYTHON,
        *ADDED,
    ):
        assert counted(tokenizer, text) == len(text.encode()), text[:40]


def test_bytes_of_tokens_added_to_sentencepiece_add_up_to_the_text(shared_data, tmp_path):
    tokens = ["<｜User｜>", "<｜fim▁hole｜>", "<tool>", "日本語"]
    tokenizer = with_added(
        shared_data / "llama2-tokenizer",
        tmp_path / "t",
        [AddedToken(token, normalized=False) for token in tokens],
    )
    for text in (
        "".join(tokens),
        "<｜User｜>print(1)<｜end｜> 日本語 naïve café 🙂🙂\r\n\n\tx",
        PYTHON,
        *tokens,
    ):
        assert counted(tokenizer, text) == len(text.encode()), text[:40]


def test_one_token_counts_its_own_bytes(byte_level, tmp_path):
    special = AddedToken("<｜end｜>", special=True)
    tokenizer = with_added(byte_level, tmp_path / "t", [*map(AddedToken, ADDED), special])
    sizes = tokenizer.token_bytes()
    found = {token: int(sizes[tokenizer.backend.token_to_id(token)]) for token in ADDED}
    assert found == {token: len(token.encode()) for token in ADDED} and found["<｜User｜>"] == 12
    assert sizes[tokenizer.backend.token_to_id("<｜end｜>")] == 0 == sizes[tokenizer.eos_id or 0]
    # What the model spells so too is counted as the model spells it: one byte, and a space before
    # a letter.
    again = with_added(byte_level, tmp_path / "again", [AddedToken("é"), AddedToken("Ġ")])
    assert [again.token_bytes()[again.backend.token_to_id(token)] for token in "éĠ"] == [1, 1]


def test_sentencepiece_bytes_and_spaces(shared_data):
    tokenizer = Tokenizer(shared_data / "llama2-tokenizer")
    sizes = tokenizer.token_bytes()
    for token, size in {
        "<0x0A>": 1,
        "<0xFF>": 1,
        "▁the": 4,
        "▁": 1,
        "<s>": 0,
        "</s>": 0,
        "<unk>": 0,
        "é": 2,
    }.items():
        assert sizes[tokenizer.backend.token_to_id(token)] == size, token


def corpus(folder: Path, tokenizer: str) -> Path:
    """Return the manifest of a corpus that was tokenized with a tokenizer of this hash."""
    splits = {split: {"samples": 100} for split in ("train", "heldout")}
    manifest = {
        "made_from": {},
        "fingerprint": "f",
        "splits": splits,
        "name": folder.name,
        "vocab_size": 300,
        "seq_length": 64,
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(dump_sealed(manifest | {"tokenizer_sha256": tokenizer}))
    return folder


def config_of(data: Path, tokenizer: str):
    asked = [
        "name=r",
        "data=local",
        "data.source.path=x",
        f"data.path={data}",
        f"data.tokenizer={tokenizer}",
        "evals.heldout={}",
    ]
    return load_config([*TINY, *asked])


def test_a_tokenizer_other_than_that_of_the_shards_is_refused_at_start(
    byte_level, tmp_path, monkeypatch
):
    made = corpus(tmp_path / "docs", Tokenizer(byte_level).sha256)
    assert (
        check_corpora(config_of(made, str(byte_level)))["tokenizer"] == Tokenizer(byte_level).sha256
    )
    other = with_added(byte_level, tmp_path / "other", [AddedToken("<tool>")]).folder
    with pytest.raises(
        UserError,
        match=rf"data.tokenizer={other} is another tokenizer than the one that "
        rf"corpus docs in {made}",
    ):
        check_corpora(config_of(made, str(other)))
    # What is not on this machine is not compared, and nothing is fetched for it.
    for absent in (
        str(tmp_path / "nowhere"),
        "nobody/nothing",
        "nobody/nothing@v1",
        "no..body/x",
        "a--b/c",
        "-a/b",
        str(made),
    ):
        assert check_corpora(config_of(made, absent))

    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    (cached / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("1" * 40) / "tokenizer.json").write_bytes(
        (other / "tokenizer.json").read_bytes()
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="data.tokenizer=some/model is another tokenizer"):
        check_corpora(config_of(made, "some/model"))


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "a/b@v1.0", "a_b/c.d"])
def test_names_of_the_hub(name):
    assert tokenizers.is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["llama", "/a/b", "a/b/c", "./a", "../a", "a/", "a--b/c", "a/b..c", "a/b c", "", "a/b@"]
)
def test_what_is_no_name_of_the_hub(name):
    assert not tokenizers.is_hub_name(name)
