"""Test .ci/setup where it cannot work: it prints one error line and exits with a non-zero code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOOLS = ["sh", "dirname", "df", "awk", "grep", "tail", "touch"]


def run_setup(folder: Path, *, python: bool, **environment: str) -> subprocess.CompletedProcess:
    """Run .ci/setup in a copy of the project, with only the tools of TOOLS on the PATH.

    With `python`, Python 3.12 is on the PATH, too.
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


def only_error_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_missing_python_312_is_reported(tmp_path):
    assert "Python 3.12 was not found" in only_error_line(run_setup(tmp_path, python=False))
    assert not (tmp_path / ".venv").exists()


def test_missing_network_is_reported(tmp_path):
    unreachable_index = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
    }
    assert "could not be fetched" in only_error_line(
        run_setup(tmp_path, python=True, **unreachable_index)
    )
    assert not (tmp_path / ".venv" / ".installed").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_full_disk_is_reported(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], check=True)
    try:
        assert "the disk is full" in only_error_line(run_setup(tmp_path, python=True))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
