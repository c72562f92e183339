"""Test the advice in messages: commands in backticks are parsed, and keys and values checked.

The advice of the rules between keys is followed by test_rules.py.
"""

import ast
import re
import shlex
from collections.abc import Iterator

import pytest
from conftest import ROOT

from retemper.pipeline.cli import parse
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import fields_of

KEYS = {key for key, _ in fields_of(Config)}
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
# Names in messages that look like keys of ours and are not: arguments of libraries and programs.
OTHERS = {"lsm", "key", "group"}
# Stands for whatever a message puts there.
VALUE = "7"
# Their strings are HTML, a shell script, and the commands of earlier versions.
NOT_READ = {"page.py", "slurm.py", "old_spellings.py"}


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every string of the program that is no docstring."""
    for folder in ("pipeline", "tokenize", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name in NOT_READ:
                continue
            tree = ast.parse(path.read_text())
            documentation = {
                id(node.value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            }
            parts = {
                id(part)
                for node in ast.walk(tree)
                if isinstance(node, ast.JoinedStr)
                for part in node.values
            }
            for node in ast.walk(tree):
                if id(node) not in documentation | parts and (text := text_of(node)):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
        return "".join(parts)
    return None


COMMANDS = [
    (place, command)
    for place, text in messages()
    for command in re.findall(r"`(retemper [a-z][^`]*)`", text)
]
PAIRS = sorted(
    {
        (place, key, value.rstrip(".,:;)"))
        for place, text in messages()
        if " " in text
        for key, value in re.findall(r"(?<![\w./{-])([a-z_]+(?:\.[a-zA-Z_]+)*)=([^\s`]+)", text)
        if key not in OTHERS
    }
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
