"""Test the advice in messages: commands in backticks are parsed, and keys and values checked.

The advice is followed by test_advice_followed.py, that of the rules between keys by test_rules.py.
"""

import re
import shlex

import pytest
from conftest import ROOT
from messages import messages

from retemper.pipeline.cli import parse
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import fields_of

KEYS = {key for key, _ in fields_of(Config)}
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
COMMANDS = [(message.place, command) for message in messages() for command in message.commands]
PAIRS = sorted(
    {(message.place, key, value) for message in messages() for key, value in message.pairs}
)


def test_there_are_messages_with_commands_and_keys():
    assert len(COMMANDS) > 15
    assert len(PAIRS) > 100


@pytest.mark.parametrize(("place", "command"), COMMANDS)
def test_advised_command_is_valid(place, command):
    words = shlex.split(command)[1:]
    if words[0] in ("data", "eval") and len(words) == 2:
        words.append("runs/study/name")  # named without its arguments
    words += ["--step", "1"] if words[:2] == ["data", "show"] and "--step" not in words else []
    words += {"import": ["folder", "run"], "export": ["run", "folder"]}.get(words[0], [])[
        len(words) - 1 :
    ]
    parse(words)


@pytest.mark.parametrize(("place", "key", "value"), PAIRS)
def test_advised_key_exists(place, key, value):
    names = re.sub(r"(tasks|mixture)\.\w+", r"\1.NAME", key), re.sub(r"(heldout)\.\w+", r"\1", key)
    sections = {known.rpartition(".")[0] for known in KEYS}
    known_names = KEYS | GROUPS | sections | {known.rpartition(".")[2] for known in KEYS}
    assert {key, *names} & known_names, f"{place}: {key}={value}"
