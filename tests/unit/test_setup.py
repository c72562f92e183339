"""Test set-up on machines where it cannot work: one clear sentence, and a non-zero exit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOOLS = ["sh", "dirname", "df", "awk", "grep", "tail", "touch"]


def set_up(folder: Path, *, python: bool, **environment: str) -> subprocess.CompletedProcess:
    """Run .ci/setup in a copy of the project, with a PATH of the bare tools.

    With `python` the PATH has Python 3.12, too.
    """
    for name in (".ci", "constraints.txt", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder)
    tools = folder / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    if python:
        (tools / "python3.12").write_text(
            f'#!/bin/sh\nexec "{Path(sys.base_prefix, "bin", "python3.12")}" "$@"\n'
        )
        (tools / "python3.12").chmod(0o755)
    return subprocess.run(
        [str(folder / ".ci" / "setup")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": str(tools), **environment},
    )


def one_error(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_without_python_312(tmp_path):
    assert "Python 3.12 was not found" in one_error(set_up(tmp_path, python=False))
    assert not (tmp_path / ".venv").exists()


def test_without_a_network(tmp_path):
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
    }
    assert "could not be fetched" in one_error(set_up(tmp_path, python=True, **nowhere))
    assert not (tmp_path / ".venv" / ".installed").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_on_a_full_disk(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], check=True)
    try:
        assert "the disk is full" in one_error(set_up(tmp_path, python=True))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
