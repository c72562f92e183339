"""Test the byte counts of tokens, also of added ones, and the check of a run's tokenizer."""

import heapq
from pathlib import Path

import pytest
from conftest import TINY
from manifests import write_manifest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus import tokenizer as tokenizers
from retemper.pipeline.corpus.tokenizer import Tokenizer, train_tokenizer
from retemper.pipeline.data.streams import check_corpora
from retemper.pipeline.errors import UserError

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


def bytes_of(tokenizer: Tokenizer, text: str) -> int:
    """Return the sum of the byte counts of a text's tokens."""
    (ids,) = tokenizer.encode([text])
    return int(tokenizer.token_bytes()[ids].sum())


@pytest.mark.parametrize("normalized", [False, True])
def test_bytes_of_added_tokens_sum_to_the_bytes_of_the_text(byte_level, tmp_path, normalized):
    tokenizer = with_added(
        byte_level, tmp_path / "t", [AddedToken(token, normalized=normalized) for token in ADDED]
    )
    for text in (
        "".join(ADDED),
        "<｜User｜>print(1)<｜end｜> 日本語 naïve café 🙂🙂\r\n\n\tx",
        PYTHON,
        *ADDED,
    ):
        assert bytes_of(tokenizer, text) == len(text.encode()), text[:40]


def test_bytes_of_tokens_added_to_sentencepiece_sum_to_the_bytes_of_the_text(shared_data, tmp_path):
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
        assert bytes_of(tokenizer, text) == len(text.encode()), text[:40]


def test_added_token_has_its_own_bytes_and_a_special_token_none(byte_level, tmp_path):
    special = AddedToken("<｜end｜>", special=True)
    tokenizer = with_added(byte_level, tmp_path / "t", [*map(AddedToken, ADDED), special])
    sizes = tokenizer.token_bytes()
    found = {token: int(sizes[tokenizer.backend.token_to_id(token)]) for token in ADDED}
    assert found == {token: len(token.encode()) for token in ADDED}
    assert found["<｜User｜>"] == 12
    assert sizes[tokenizer.backend.token_to_id("<｜end｜>")] == 0
    assert sizes[tokenizer.eos_id or 0] == 0
    # A byte-level vocabulary already contains these two characters, as its spellings of one byte
    # and of a space. So their size is that of the spelling: one byte.
    ambiguous = with_added(byte_level, tmp_path / "again", [AddedToken("é"), AddedToken("Ġ")])
    for token in "éĠ":
        assert ambiguous.token_bytes()[ambiguous.backend.token_to_id(token)] == 1, token


def test_bytes_of_sentencepiece_byte_and_space_tokens(shared_data):
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


def config_of(data: Path, tokenizer: str):
    changes = [
        "name=r",
        "data=local",
        "data.source.path=x",
        f"data.path={data}",
        f"data.tokenizer={tokenizer}",
        "evals.heldout={}",
    ]
    return load_config([*TINY, *changes])


def test_tokenizer_other_than_that_of_the_shards_is_refused_at_start(
    byte_level, tmp_path, monkeypatch
):
    shards = write_manifest(tmp_path / "docs", 100, Tokenizer(byte_level).sha256)
    assert (
        check_corpora(config_of(shards, str(byte_level)))["tokenizer"]
        == Tokenizer(byte_level).sha256
    )
    other = with_added(byte_level, tmp_path / "other", [AddedToken("<tool>")]).folder
    with pytest.raises(
        UserError,
        match=rf"data.tokenizer={other} is another tokenizer than the one that "
        rf"corpus docs in {shards}",
    ):
        check_corpora(config_of(shards, str(other)))
    # A tokenizer that is not on this machine is neither compared nor downloaded.
    for absent in (
        str(tmp_path / "nowhere"),
        "nobody/nothing",
        "nobody/nothing@v1",
        "no..body/x",
        "a--b/c",
        "-a/b",
        str(shards),
    ):
        assert check_corpora(config_of(shards, absent))

    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    (cached / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("1" * 40) / "tokenizer.json").write_bytes(
        (other / "tokenizer.json").read_bytes()
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="data.tokenizer=some/model is another tokenizer"):
        check_corpora(config_of(shards, "some/model"))


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "a/b@v1.0", "a_b/c.d"])
def test_hub_name_is_recognized(name):
    assert tokenizers.is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["llama", "/a/b", "a/b/c", "./a", "../a", "a/", "a--b/c", "a/b..c", "a/b c", "", "a/b@"]
)
def test_other_name_is_not_taken_for_a_hub_name(name):
    assert not tokenizers.is_hub_name(name)
