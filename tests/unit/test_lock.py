"""Test that only one process trains a run, and that the lock of a killed process is released."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.lock import only_one

HOLD = """
import sys, time
from pathlib import Path
from retemper.pipeline.files.lock import only_one
with only_one(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_held_lock_names_its_process_and_is_released_when_that_is_killed(tmp_path):
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refusal = rf"^busy: process {holder.pid} on {socket.gethostname()}$"
        with pytest.raises(UserError, match=refusal), only_one(path, "busy: {process}"):
            pass
        holder.send_signal(signal.SIGKILL)
    with only_one(path, "busy"):
        assert str(os.getpid()) in path.read_text()
    assert not path.exists()


def test_a_run_that_is_being_trained_is_refused_before_its_model_is_built(tmp_path):
    from retemper.pipeline.train.loop import train

    config = SimpleNamespace(run_dir=tmp_path)
    with (
        only_one(tmp_path / ".lock", ""),
        pytest.raises(UserError, match=f"{tmp_path} is being trained by process {os.getpid()} "),
    ):
        train(config, SimpleNamespace(rank=0), {})
