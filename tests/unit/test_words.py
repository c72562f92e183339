"""Test that values of a command line are taken as they are meant, whatever characters they have."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.words import quoted
from retemper.pipeline.errors import UserError

# What people have typed, and others' file names.
VALUES = [
    "3.10", "007", "1e5", "on", "2024-11-27", "a b", "a,b", "a=b", "a#b", "a(b)", "[x]", "{x}",
    "C:\\x", "a\"b\\", "it's", "数据/文", "$HOME/x", "a%20b", " a", "@x", "a;b", "a|b&c", "*.py",
]  # fmt: skip


def value_of(key: str, value: str) -> str:
    found = load_config(["run=demo_base", f"{key}={value}"]).model_dump()
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("value", VALUES)
def test_text_is_taken_as_it_is_typed(value):
    assert value_of("data.path", value) == value


@settings(deadline=None, max_examples=25)
@given(st.text(st.characters(exclude_characters="\0\n\r$", codec="utf-8"), min_size=1))
def test_any_text_is_taken_as_it_is_typed(value):
    if value[0] not in "\"'~" and value not in ("null", "???"):
        assert value_of("data.tokenizer", value) == value


@pytest.mark.parametrize("key", ["data.path", "runs_dir", "evals.heldout.wiki", "evals.tasks_dir"])
def test_a_path_in_the_home_folder_may_begin_with_a_tilde(key):
    assert value_of(key, "~/x") == os.path.expanduser("~/x")


def test_quotes_null_and_interpolations_keep_their_meaning():
    assert value_of("data.path", "'a b'") == "a b"
    assert value_of("init_from", "null") is None
    assert value_of("data.path", "${runs_dir}/q") == "runs/q"
    with pytest.raises(UserError, match="name: Input should be a valid string"):
        value_of("name", "null")


@pytest.mark.parametrize("word", ["optimizer.lr=1e-4", "data=local", "train.branches=[1]", "x=y"])
def test_other_values_are_left_to_hydra(word):
    assert quoted(word) == word
