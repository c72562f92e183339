"""The layout that everything stands on."""

import importlib
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ["pipeline", "tokenize", "launch", "conf", "tests", "docker"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_tokenize_stays_the_standard_librarys():
    assert not (ROOT / "tokenize" / "__init__.py").exists()
    code = "import tokenize, inspect; print(tokenize.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).resolve() == Path(sysconfig.get_path("stdlib"), "tokenize.py").resolve()


def test_every_folder_of_code_is_a_declared_package():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for room in ("pipeline", "tokenize", "launch", "conf") for path in (ROOT / room).rglob("*.py")}
    assert declared == {"retemper." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_conf_is_a_package():
    assert importlib.import_module("retemper.conf").__file__


@pytest.mark.parametrize("room", [*ROOMS, *sorted(f"pipeline/{path.parent.name}" for path in ROOT.glob("pipeline/*/__init__.py"))])
def test_every_room_says_what_it_owns(room):
    assert len((ROOT / room / "README.md").read_text().split()) > 20


def test_only_their_rooms_import_wandb_and_parallel_state():
    for word, allowed in (("import wandb", {"pipeline/track.py"}), ("import parallel_state", {"pipeline/distributed/topology.py"})):
        users = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py") if word in path.read_text()}
        assert users == allowed


def test_the_pinned_set_names_no_index_and_pins_everything():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all("==" in line and "://" not in line and not line.startswith("-") for line in lines)
