"""Test the layout of the project."""

import ast
import graphlib
import importlib
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

CODE = ["pipeline", "tokenize", "launch", "conf"]
ROOMS = [*CODE, "tests", "docker"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_tokenize_stays_the_standard_librarys():
    assert not (ROOT / "tokenize" / "__init__.py").exists()
    code = "import tokenize, inspect; print(tokenize.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).resolve() == Path(sysconfig.get_path("stdlib"), "tokenize.py").resolve()


def test_a_module_has_one_path_from_wherever_it_is_imported(tmp_path):
    code = (
        "import retemper.pipeline.config.compose as one, retemper.tokenize.job as other; "
        "print(one.__file__, other.__file__)"
    )
    expected = f"{ROOT / 'pipeline' / 'config' / 'compose.py'} {ROOT / 'tokenize' / 'job.py'}\n"
    for folder in (ROOT, ROOT / "retemper", tmp_path):
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        assert found.stdout == expected, folder


def test_the_import_root_holds_relative_links_and_nothing_else():
    links = {
        path.name: path.readlink() for path in (ROOT / "retemper").iterdir() if path.is_symlink()
    }
    assert links == {name: Path("..", name) for name in CODE}
    others = {path.name for path in (ROOT / "retemper").iterdir()} - links.keys() - {"__pycache__"}
    assert others == {"__init__.py"}


def test_a_wheel_holds_every_file_once_and_no_link(tmp_path):
    copy = tmp_path / "source"
    for name in (*CODE, "retemper"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)
    code = [path for name in CODE for path in (ROOT / name).rglob("*.py")]
    files = [*code, *(ROOT / "conf").rglob("*.yaml")]
    expected = ["retemper/__init__.py", *(f"retemper/{path.relative_to(ROOT)}" for path in files)]
    assert sorted(entry.filename for entry in entries) == sorted(expected)


def test_every_folder_of_code_is_a_declared_package():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for room in CODE for path in (ROOT / room).rglob("*.py")}
    assert declared == {
        "retemper",
        *("retemper." + ".".join(folder.relative_to(ROOT).parts) for folder in folders),
    }


def test_conf_is_a_package():
    assert importlib.import_module("retemper.conf").__file__


@pytest.mark.parametrize(
    "room",
    [
        *ROOMS,
        *sorted(f"pipeline/{path.parent.name}" for path in ROOT.glob("pipeline/*/__init__.py")),
    ],
)
def test_every_room_says_what_it_owns(room):
    assert len((ROOT / room / "README.md").read_text().split()) > 20


def test_only_their_rooms_import_wandb_and_parallel_state():
    distributed = {f"pipeline/distributed/{name}.py" for name in ("topology", "collectives")}
    for word, allowed in (
        ("import wandb", {"pipeline/runs/track.py"}),
        ("import parallel_state", distributed),
    ):
        users = {
            str(path.relative_to(ROOT))
            for room in CODE
            for path in (ROOT / room).rglob("*.py")
            if word in path.read_text()
        }
        assert users == allowed


def test_the_pinned_set_names_no_index_and_pins_everything():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) > 100
    assert all("==" in line and "://" not in line and not line.startswith("-") for line in lines)


# An import leads from a package to one of the floors below it, or stays within the package.
FLOORS = [
    {"errors", "conf"},
    {"schema", "files"},
    {"config", "corpus", "compat"},
    {"runs", "distributed"},
    {"data"},
    {"model", "tokenize"},
    {"checkpoint"},
    {"estimate"},
    {"evals", "launch"},
    {"report", "entry"},
    {"train", "huggingface"},
    {"study"},
    {"commands"},
    {"cli"},
    {"evals.__main__", "huggingface.__main__", "train.__main__"},
]
MODULES = {
    ".".join(("retemper", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for name in CODE
    for path in (ROOT / name).rglob("*.py")
}


def imported_by(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("retemper")}
        elif isinstance(node, ast.ImportFrom):
            here = ("retemper", *path.relative_to(ROOT).parts)
            above = here[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            if module.split(".")[0] == "retemper":
                names = [f"{module}.{alias.name}" for alias in node.names]
                found |= {name if name in MODULES else module for name in names}
    assert found <= MODULES.keys(), f"{path} imports {found - MODULES.keys()}, which is not there"
    return found


def package_of(module: str) -> str:
    """Return the package of a module.

    It is a folder of pipeline/ or of the root, or an entry point of ranks.
    """
    _, root, *parts = module.split(".")
    if module.endswith(".__main__"):
        return f"{parts[0]}.__main__"
    return parts[0] if root == "pipeline" and parts else root


def test_imports_lead_down():
    floor_of = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
    for module, path in MODULES.items():
        package = package_of(module)
        for target in map(package_of, imported_by(path)):
            assert target == package or floor_of[target] < floor_of[package], (
                f"{module} imports {target}"
            )


def test_no_files_import_each_other_in_a_circle():
    imports = {module: imported_by(path) for module, path in MODULES.items()}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in MODULES.values())
    assert {name for name, count in names.items() if count > 1} == {"__init__.py", "__main__.py"}


def test_no_module_changes_another_when_it_is_imported():
    """Check that changes to other libraries are in compat/ and are applied by a call."""
    for path in MODULES.values():
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            assert not any(isinstance(target, ast.Attribute) for target in targets), path
