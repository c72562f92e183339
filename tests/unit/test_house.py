"""The layout that everything stands on."""

import importlib
import re
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


# Imports point from a floor to the floors below it (or stay on it): errors and config carry everything.
FLOORS = [
    {"errors"},
    {"schema"},
    {"activations", "flops", "schedules"},
    {"activations_te"},
    {"memory", "rates", "rules"},
    {"config"},
    {"distributed", "run_folder", "leases", "records", "eval_folder"},
    {"data", "model", "track"},
    {"checkpoint", "evals"},
    {"trunk"},
    {"preflight", "plan"},
    {"ranks"},
    {"train", "report", "huggingface"},
    {"study"},
    {"cli"},
]


def test_imports_point_one_way():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for path in (ROOT / "pipeline").rglob("*.py"):
        room = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
        # The entry point of a package is on the floor of what launches ranks.
        floor = max(floor_of["ranks"], floor_of[room]) if path.name == "__main__.py" else floor_of.get(room, 0)
        for target in re.findall(r"from retemper\.pipeline\.(\w+)[\w.]* import|from retemper\.pipeline import (\w+)", path.read_text()):
            assert floor_of[target[0] or target[1]] <= floor, f"{path.relative_to(ROOT)} imports {target[0] or target[1]}"
