"""Test what is printed and written when an error occurs that nobody foresaw."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retemper.pipeline.distributed.unexpected import report_unexpected

COMMAND = """
import sys
from retemper.pipeline.commands import training
def fault(arguments):
    raise RuntimeError("a fault\\nof several lines")
training._train = fault
from retemper.pipeline.cli import run
run()
"""
RANK = """
import sys
from retemper.pipeline.entry.rank import run_prepared
def prepare():
    raise KeyError("a fault")
sys.exit(run_prepared(prepare, None))
"""


@pytest.mark.parametrize(
    ("script", "options", "line"),
    [
        (COMMAND, [], "error: RuntimeError: a fault; the full trace is in "),
        (COMMAND, ["--debug"], "error: RuntimeError: a fault; the full trace is in "),
        (RANK, [], "error: KeyError: 'a fault'; the full trace is in "),
    ],
)
def test_an_unforeseen_error_is_one_line_and_a_file_with_the_trace(script, options, line, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", script, "train", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == bool(options)
    *_, last = result.stderr.splitlines()
    assert last.startswith(line) and (options or result.stderr.count("\n") == 1)
    trace = Path(last.partition(line)[2]).read_text()
    assert trace.startswith("Traceback") and "a fault" in trace


def test_the_trace_is_in_the_run_folder_or_else_in_a_temporary_file(tmp_path):
    def file_of(message):
        return Path(re.search(r"the full trace is in (.*)$", message)[1])

    assert file_of(report_unexpected(ValueError(), tmp_path)).parent == tmp_path
    temporary = file_of(report_unexpected(ValueError("\ud800"), tmp_path / "gone"))
    assert "ValueError" in temporary.read_text()
    temporary.unlink()


def test_a_full_gpu_has_advice_of_its_own(tmp_path):
    message = report_unexpected(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0"), tmp_path
    )
    assert "Tried to allocate 20.00 GiB; set a smaller train.micro_batch_size" in message
    assert "\n" not in message
