"""Collect the messages of the program, and the commands and settings that they advise."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Their strings are HTML, a shell script, and the commands of earlier versions.
_NOT_READ = {"page.py", "slurm.py", "old_spellings.py"}
_PAIR = re.compile(r"(?<![\w./{-])([a-z_]+(?:\.[a-zA-Z_]+)*)=([^\s`]+)")
# Names in messages that look like keys of ours and are not: arguments of libraries and programs.
_OTHERS = {"lsm", "key", "group"}
# Keys of another program's file, config.json.
_OTHERS |= {"architectures", "layer_types", "model_type", "num_attention_heads", "pad_token_id"}
_OTHERS |= {"num_hidden_layers", "num_key_value_heads"}
# Stands for whatever a message puts there.
_VALUE = "7"


@dataclass(frozen=True)
class Message:
    """A string of the program that is no docstring."""

    place: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands in backticks."""
        return re.findall(r"`(retemper [a-z][^`]*)`", self.text)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every key=value."""
        pairs = _PAIR.findall(self.text) if " " in self.text else []
        return [(key, value.rstrip(".,:;)")) for key, value in pairs if key not in _OTHERS]


def messages() -> Iterator[Message]:
    """Yield every message of the program."""
    for folder in ("pipeline", "tokenize", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in _NOT_READ:
                yield from _messages_of(path)


def _messages_of(path: Path) -> Iterator[Message]:
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
        if id(node) not in documentation | parts and (text := _text_of(node)):
            yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", text)


def _text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else _VALUE for part in node.values]
        return "".join(parts)
    return None
