"""Test that no setting saved in a tokenizer folder changes the ids of a text or of a prompt."""

import heapq
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.corpus.tokenizer import Tokenizer, train_tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.run_tokenizer import prompt_tokenizer
from retemper.tokenize.encoder import Encoder

PYTHON = Path(heapq.__file__).read_text()
SIDES = st.sampled_from(["Left", "Right"])


def templates(bos: dict, eos: dict) -> st.SearchStrategy:
    """Return post-processors that put special tokens around a text, or none."""
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    begin = [{"SpecialToken": {"id": bos["content"], "type_id": 0}}]
    end = [{"SpecialToken": {"id": eos["content"], "type_id": 0}}]
    known = {
        token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": ["?"]}
        for token in (bos, eos)
    }
    template = st.builds(
        lambda before, after: {
            "type": "TemplateProcessing",
            "single": [*before, piece, *after],
            "pair": [piece],
            "special_tokens": known,
        },
        st.sampled_from([[], begin]),
        st.sampled_from([[], end, [*end, *end]]),
    )
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    sequence = st.builds(
        lambda own: {"type": "Sequence", "processors": [byte_level, own]}, template
    )
    return st.none() | template | sequence


TRUNCATION = st.fixed_dictionaries(
    {
        "direction": SIDES,
        "max_length": st.integers(1, 9),
        "strategy": st.sampled_from(["LongestFirst", "OnlyFirst"]),
        "stride": st.just(0),
    }
)
PADDING = st.fixed_dictionaries(
    {
        "strategy": st.just("BatchLongest") | st.builds(lambda n: {"Fixed": n}, st.integers(0, 40)),
        "direction": SIDES,
        "pad_to_multiple_of": st.none() | st.integers(1, 16),
        "pad_id": st.integers(0, 3),
        "pad_type_id": st.just(0),
        "pad_token": st.just("?"),
    }
)
# What AutoTokenizer would obey or fail on.
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
        "add_prefix_space": st.booleans(),
        "model_max_length": st.integers(1, 9),
        "tokenizer_class": st.sampled_from(
            ["LlamaTokenizer", "TokenizersBackend", "NoSuchTokenizer", "BertTokenizer"]
        ),
        "auto_map": st.just({"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}),
        "added_tokens_decoder": st.just({"9": {"content": "e", "special": True}}),
        "additional_special_tokens": st.just(["heap", "in"]),
        "extra_special_tokens": st.just(["heap"]),
        "clean_up_tokenization_spaces": st.booleans(),
        "split_special_tokens": st.booleans(),
        "do_lower_case": st.booleans(),
        "truncation_side": st.sampled_from(["left", "right"]),
        "padding_side": st.sampled_from(["left", "right"]),
    },
)
TEXTS = st.lists(
    st.text(max_size=30)
    | st.builds(lambda start, size: PYTHON[start : start + size], *[st.integers(0, 2000)] * 2),
    max_size=4,
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    train_tokenizer([PYTHON], 400, folder)
    return folder


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def plain(request, byte_level) -> Path:
    """Return a tokenizer folder: one of this program, and a real one of a Llama."""
    if request.param == "byte_level":
        return byte_level
    return request.getfixturevalue("shared_data") / "stories260K"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ids_are_those_of_the_plain_tokenizer_whatever_a_folder_sets(plain, tmp_path_factory, data):
    content = json.loads((plain / "tokenizer.json").read_text())
    eos = content["added_tokens"][-1]
    folder = tmp_path_factory.getbasetemp() / f"changed-{plain.name}"
    content["truncation"] = data.draw(st.none() | TRUNCATION)
    content["padding"] = data.draw(st.none() | PADDING)
    content["model"]["dropout"] = data.draw(st.none() | st.floats(0.1, 1))
    content["post_processor"] = data.draw(templates(content["added_tokens"][0], eos))
    config = data.draw(CONFIGS) | {"eos_token": eos["content"]}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    texts = data.draw(TEXTS)
    reference = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    reference.encode_special_tokens = True
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(texts) == expected
    utf8 = [text.encode() for text in texts]
    fast, fast_plain = (Encoder(each, "gigatoken").encode(utf8) for each in (folder, plain))
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in fast_plain]

    prompts = prompt_tokenizer(tokenizer)
    assert prompts.eos_token_id == eos["id"]
    spelled = [token["content"] for token in content["added_tokens"]]
    for text, ids in zip(texts, expected, strict=True):
        if not any(token in text for token in spelled):
            assert prompts.encode(text, add_special_tokens=False) == ids
            whole = prompts.encode(text)
            before = whole[: len(whole) - len(ids)]
            assert whole == [*before, *ids], "something was appended"
            assert len(before) <= 1


def test_a_prompt_begins_with_the_tokens_of_the_folder_and_ends_with_none(shared_data, tmp_path):
    source = shared_data / "llama2-tokenizer"
    shutil.copytree(source, tmp_path / "t")
    content = json.loads((source / "tokenizer.json").read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {
        "id": "</s>", "ids": [2], "tokens": ["</s>"],
    }  # fmt: skip
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((source / "tokenizer_config.json").read_text())
    for changes, before in (
        ({}, [1]),
        ({"add_eos_token": True}, [1]),
        ({"add_bos_token": False}, []),
        # Mistral's folders have it: AutoTokenizer then wants sentencepiece.
        ({"add_prefix_space": True}, [1]),
        ({"tokenizer_class": "TokenizersBackend", "add_bos_token": None}, [1]),  # transformers 5
    ):
        (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | changes))
        prompts = prompt_tokenizer(Tokenizer(tmp_path / "t"))
        assert prompts.encode("a b") == [*before, *Tokenizer(source).encode(["a b"])[0]], changes


def test_tokens_with_other_ids_than_the_file_says_are_refused(byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 500, "content": "<tool>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'<tool>' has the id 500, but .* reads 400"):
        Tokenizer(tmp_path)


def test_ids_with_a_gap_have_bytes_and_a_type_that_holds_them(byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (70_001, "uint32")
    assert tokenizer.token_bytes()[70_000] == 3


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a"', b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_file_beside_the_tokenizer_is_named(byte_level, tmp_path, name, content):
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Tokenizer(tmp_path)


def test_special_tokens_may_be_named_in_an_older_folder_s_own_file(byte_level, tmp_path):
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    for token in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
        assert Tokenizer(tmp_path).eos_id == Tokenizer(byte_level).eos_id
    for token in (["<|endoftext|>"], {"a": 1}, 7, "not in the vocabulary"):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
        assert Tokenizer(tmp_path).eos_id is None


def test_a_file_on_which_the_library_panics_is_refused(byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "////"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer that this version"):
        Tokenizer(tmp_path)
