"""Test README, docs and the examples of --help: every command is valid, every link leads somewhere.

`pytest -m slow` also runs the commands that work on a laptop, in order, after the demo.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from documented import PAGES, Command, documented_commands, help_examples, words_of
from manifests import write_manifest

from retemper.pipeline.cli import _parser, parse
from retemper.pipeline.config.compose import load_config, load_data_config
from retemper.pipeline.config.key_docs import keys_as_markdown
from retemper.pipeline.config.stored import read_config

PACKAGES = ("benchmarks", "conf", "docker", "launch", "pipeline", "tests", "tokenize")
COMMANDS = documented_commands()
# Pages without commands to check: changes, pages for developers, and one for each package.
OTHER_PAGES = [
    ROOT / "CHANGELOG.md",
    *(ROOT / "docs" / "dev").glob("*.md"),
    *(page for folder in PACKAGES for page in (ROOT / folder).rglob("README.md")),
]
EXAMPLES = [
    Command("--help", number, text, runs=False)
    for number, text in enumerate(help_examples(_parser()))
]
# Programs beside retemper that the pages use.
OTHERS = {
    ".",
    "bash",
    "cat",
    "cd",
    "cp",
    "docker",
    "export",
    "git",
    "kill",
    "kubectl",
    "ls",
    "make",
    "mkdir",
    "pip",
    "printf",
    "python",
    "sbatch",
    "seq",
    "squeue",
    "srun",
    "tail",
    "torchrun",
    "wandb",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with what composing needs of the runs and models that the pages name."""
    folder = tmp_path_factory.mktemp("documented")
    models = {
        name: yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
        for name in ("tiny", "llama2_7b")
    }
    for command in COMMANDS + EXAMPLES:
        for start in re.findall(r"(?:init_from|branch_of)=([\w./-]+)", command.text):
            run = folder / start
            run.mkdir(parents=True, exist_ok=True)
            model = models["tiny" if start.startswith("runs/demo/") else "llama2_7b"]
            config = {"model": model, "method": {"name": "full"}}
            (run / "config.json").write_text(json.dumps(config))
    for corpus in ("runs/demo/data/code", "shards/metamathqa"):  # for the length of an epoch
        write_manifest(folder / corpus, 1000)
    return folder


@pytest.mark.parametrize("command", COMMANDS + EXAMPLES, ids=str)
def test_documented_command_is_valid(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    name = command.text.split()[0]
    calls = words_of(command.text, "retemper", folder)
    if name == "torchrun":
        (words,) = words_of(command.text, "torchrun", folder)
        assert {"retemper.pipeline.train", "retemper.pipeline.evals"} & set(words)
        keys = [word for word in words if "=" in word and not word.startswith("--")]
        load_config(["run=demo_base", *keys])
    elif not calls:
        assert name in OTHERS, f"{command}: what is {name}?"
    for words in calls:
        check_words(words)


def check_words(words: list[str]) -> None:
    """Parse the arguments of `retemper`, and compose the config keys among them."""
    if words in (["--version"], ["--help"]) or words[-1:] == ["--help"]:
        return
    arguments = parse(words)
    keys = getattr(arguments, "keys", [])
    verb = words[0]
    if verb == "tokenize":
        load_data_config(keys)
    elif verb == "config" and arguments.docs is not None:
        assert arguments.docs == "" or arguments.docs in keys_as_markdown(), arguments.docs
    elif verb in ("train", "config", "plan", "launch"):
        load_config(keys)
    elif verb == "demo":
        load_config(["run=demo_base", *keys])
    elif verb in ("import", "eval"):
        # Overrides of a config that is elsewhere: each must be a key or a preset.
        load_config(["run=demo_base", "model=llama2_70b", *keys])


def test_messages_that_the_docs_explain_are_in_the_code():
    texts = [text for path in code_files() for text in texts_of(ast.parse(path.read_text()))]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`[^|]*\|", page, re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        longest = max(re.split(r"…|[A-Z]{3,}|; ", message), key=len).strip()
        assert any(longest in text for text in texts), message


def code_files() -> list[Path]:
    return [
        path for name in ("pipeline", "tokenize", "launch") for path in (ROOT / name).rglob("*.py")
    ]


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Yield all strings of a file; a value within one becomes "…"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "…" for part in node.values
            )


def test_links_lead_to_files():
    for page in [*PAGES, *OTHER_PAGES]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_page_of_config_keys_is_current():
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == keys_as_markdown(), "run `make docs`"


def test_prose_has_lines_of_at_most_100_columns():
    for page in {*PAGES, *OTHER_PAGES} - {ROOT / "docs" / "configuration.md"}:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            long = len(line) > 100 and not line.startswith(("|", "#", "!["))
            assert not long, f"{page.relative_to(ROOT)}:{number}"


@pytest.mark.slow
def test_documented_commands_run(tmp_path):
    """Run all commands that need no cluster, GPU or network, in one folder with the demo."""
    for name in ("docs", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    failed = []
    seen = set()
    for command in COMMANDS:
        text = command.text
        other = text != "make demo" and text.startswith((". ", "make "))
        if not command.runs or other or text in seen:
            continue
        seen.add(text)
        started = time.monotonic()
        result = subprocess.run(
            ["bash", "-c", "retemper demo" if text == "make demo" else text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        print(f"{time.monotonic() - started:.0f} s: {command}", flush=True)
        if result.returncode:
            failed.append(f"{command}\n{result.stdout[-1000:]}{result.stderr[-2000:]}")
    assert not failed, f"{len(failed)} of {len(seen)} commands:\n" + "\n".join(failed)
    own = read_config(tmp_path / "runs" / "mine" / "lora")
    assert own and own["init_from"] == "runs/demo/base"
