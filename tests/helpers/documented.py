"""Collect the command lines of README and docs, and of each verb's --help."""

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Command:
    """A command line of a page.

    `runs` says whether it works on a laptop after the demo. Otherwise its block begins with
    "```sh no-run": it needs a cluster, a GPU, the network or files of one's own.
    """

    page: str
    line: int
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def documented_commands() -> list[Command]:
    """Return the commands of all pages in order, each on one line."""
    return [command for page in PAGES for command in _commands_of(page)]


def _commands_of(page: Path) -> Iterator[Command]:
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    for block in re.finditer(r"^```sh( no-run)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        number = text[: block.start(2)].count("\n") + 1
        waiting = ""
        for offset, line in enumerate(block[2].splitlines()):
            waiting += line.removesuffix("\\")
            if not line.endswith("\\"):
                if waiting.strip() and not waiting.startswith("#"):
                    yield Command(name, number + offset, waiting, runs=not block[1])
                waiting = ""


def help_examples(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the examples in the help of a parser and of its verbs."""
    for line in (parser.epilog or "").splitlines():
        if line.startswith("  retemper "):
            yield line.strip()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from help_examples(verb)


def words_of(command: str, name: str, folder: Path) -> list[list[str]]:
    """Return the arguments that bash would give to `name`, for each time that it is called.

    Redirections and pipes are carried out in `folder`, other commands are not run.
    """
    script = (
        f'{name}() {{ printf "%s\\0" "$@" >&3; printf "\\n\\0" >&3; }}\n'
        f"command_not_found_handle() {{ :; }}\nPATH=\n{command}"
    )
    read, write = os.pipe()
    with subprocess.Popen(
        ["/bin/bash", "-c", f"exec 3>&{write}\n{script}"],
        cwd=folder,
        pass_fds=[write],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        os.close(write)
        with open(read) as pipe:
            words = pipe.read().split("\0")[:-1]
    calls: list[list[str]] = [[]]
    for word in words:
        if word == "\n":
            calls.append([])
        else:
            calls[-1].append(word)
    return calls[:-1]
