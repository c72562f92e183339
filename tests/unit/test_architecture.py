"""Test the layout of the repository: its packages, its imports and the wheel built from it."""

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
DOCUMENTED = [*CODE, "tests", "docker"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_import_tokenize_gives_the_standard_library_module():
    assert not (ROOT / "tokenize" / "__init__.py").exists()
    script = "import tokenize, inspect; print(tokenize.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).resolve() == Path(sysconfig.get_path("stdlib"), "tokenize.py").resolve()


def test_a_module_has_the_same_path_from_every_working_directory(tmp_path):
    script = (
        "import retemper.pipeline.config.compose as one, retemper.tokenize.job as other; "
        "print(one.__file__, other.__file__)"
    )
    expected = f"{ROOT / 'pipeline' / 'config' / 'compose.py'} {ROOT / 'tokenize' / 'job.py'}\n"
    for folder in (ROOT, ROOT / "retemper", tmp_path):
        found = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
        )
        assert found.stdout == expected, folder


def test_the_import_root_contains_only_relative_links():
    links = {
        path.name: path.readlink() for path in (ROOT / "retemper").iterdir() if path.is_symlink()
    }
    assert links == {name: Path("..", name) for name in CODE}
    others = {path.name for path in (ROOT / "retemper").iterdir()} - links.keys() - {"__pycache__"}
    assert others == {"__init__.py"}


def test_a_wheel_contains_every_file_once_and_no_link(tmp_path):
    copy = tmp_path / "source"
    for name in (*CODE, "retemper"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)
    modules = [path for name in CODE for path in (ROOT / name).rglob("*.py")]
    files = [*modules, *(ROOT / "conf").rglob("*.yaml")]
    expected = ["retemper/__init__.py", *(f"retemper/{path.relative_to(ROOT)}" for path in files)]
    assert sorted(entry.filename for entry in entries) == sorted(expected)


def test_every_code_folder_is_a_declared_package():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for name in CODE for path in (ROOT / name).rglob("*.py")}
    assert declared == {
        "retemper",
        *("retemper." + ".".join(folder.relative_to(ROOT).parts) for folder in folders),
    }


def test_conf_is_a_package():
    assert importlib.import_module("retemper.conf").__file__


@pytest.mark.parametrize(
    "package",
    [
        *DOCUMENTED,
        *sorted(f"pipeline/{path.parent.name}" for path in ROOT.glob("pipeline/*/__init__.py")),
    ],
)
def test_every_package_has_a_readme(package):
    assert len((ROOT / package / "README.md").read_text().split()) > 20


def test_wandb_and_parallel_state_are_imported_only_by_their_wrappers():
    distributed = {f"pipeline/distributed/{name}.py" for name in ("topology", "collectives")}
    for name, allowed in (
        ("wandb", {"pipeline/runs/track.py", "pipeline/compat/light_imports.py"}),
        ("parallel_state", distributed),
    ):
        users = {
            str(path.relative_to(ROOT))
            for path in MODULES.values()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            if name in {getattr(node, "module", None), *(alias.name for alias in node.names)}
        }
        assert users == allowed


def test_the_constraints_pin_every_package_and_name_no_index():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) > 100
    for line in lines:
        assert "==" in line, line
        assert "://" not in line, line
        assert not line.startswith("-"), line


# An import leads from a package to one of the floors below it, or stays within the package.
FLOORS = [
    {"errors", "conf"},
    {"schema", "files"},
    {"corpus", "compat"},
    {"config"},
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
    """Return the modules of this project that a file imports, at its top or in a function."""
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

    That is a folder of pipeline/, a folder of the root, or the module that starts the ranks.
    """
    _, root, *parts = module.split(".")
    if module.endswith(".__main__"):
        return f"{parts[0]}.__main__"
    return parts[0] if root == "pipeline" and parts else root


def test_imports_lead_only_to_lower_floors():
    floor_of = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
    for module, path in MODULES.items():
        package = package_of(module)
        for target in map(package_of, imported_by(path)):
            assert target == package or floor_of[target] < floor_of[package], (
                f"{module} imports {target}"
            )


def test_there_are_no_import_cycles():
    imports = {module: imported_by(path) for module, path in MODULES.items()}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_no_two_modules_have_the_same_file_name():
    names = Counter(path.name for path in MODULES.values())
    assert {name for name, count in names.items() if count > 1} == {"__init__.py", "__main__.py"}


def test_importing_a_module_does_not_patch_another():
    """Check that no module assigns to an attribute of another at its top level.

    Patches of other libraries are in compat/ and are applied by a call.
    """
    for path in MODULES.values():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []  # what runs at import is left
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
            assert not any(isinstance(target, ast.Attribute) for target in targets), path
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "setattr"), path


# For each row of the table in docs/dev/style.md: a text that each of its files contains.
BEHAVIOURS = {
    "learning-rate schedule": ("OptimizerParamScheduler(", "def length_of"),
    "hash of a shard": ("sha256",),
    "LoRA's target layers": ("targets", "_TARGET_GROUPS"),
    "CPU limit of a program": ("RLIMIT_CPU", "cpu_seconds="),
    "W&B run id": ("id=id_file",),
    "size of the demo's model": ("/model: tiny", "hidden_size"),
    "refusal of an unknown key": ('extra="forbid"', "unknown key"),
    "loss mask of a prompt": ("prompt_lengths",),
    "rename of a checkpoint": (".rename(",),
    "memory of activations": ("class Activations",),
}


def test_ten_behaviours_are_in_the_files_that_the_style_guide_names():
    table = (ROOT / "docs" / "dev" / "style.md").read_text().partition("| behaviour |")[2]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [name for name, *_ in rows] == list(BEHAVIOURS)
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    for name, *files in rows:
        files = [file for file in files if file != "–"]
        assert len(files) == len(BEHAVIOURS[name])
        for file, content in zip(files, BEHAVIOURS[name], strict=True):
            assert content in (ROOT / file).read_text(), (name, file)
        *_, folder, first = files[0].split("/")
        assert first in tree or f"{folder}/" in tree
