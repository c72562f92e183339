"""Test what signals do to ranks and to the process that started them, with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from retemper.launch import local
from retemper.pipeline.distributed.signals import catch_stop_signals

RANK = """
import os, signal
from retemper.pipeline.distributed import signals
signals.die_with_launcher()
with signals.catch_stop_signals():
    for name in {sent}:
        os.kill(os.getpid(), getattr(signal, name))
    print("saves")
"""


@pytest.mark.parametrize(
    ("sent", "code", "saved"),
    [
        (["SIGINT"], 0, True),
        (["SIGHUP", "SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT"], 0, True),
        (["SIGINT", "SIGINT"], 130, False),
    ],
)
def test_a_training_rank_saves_at_the_first_ctrl_c_and_leaves_at_the_second(sent, code, saved):
    script = RANK.format(sent=sent)
    rank = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (rank.returncode, "saves" in rank.stdout) == (code, saved), rank.stderr
    assert rank.stderr.count("Ctrl-C again leaves at once") == 1


def test_a_closed_terminal_does_not_stop_what_nohup_has_started():
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + RANK.format(
        sent=["SIGHUP"]
    )
    rank = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (rank.stdout, rank.stderr) == ("saves\n", "")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with local._stop_signals_forwarded() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not received


STUBBORN = "import signal, time; signal.signal(15, print); print('up', flush=True); time.sleep(60)"


def test_the_launcher_asks_ranks_to_stop_and_kills_them_at_the_second_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    with local._stop_signals_forwarded() as received:
        rank = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        assert rank.stdout.readline() == b"up\n"
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert rank.poll() is None, "it may still be saving"
        os.kill(os.getpid(), signal.SIGINT)
        assert rank.wait(20) == -signal.SIGKILL
    assert len(received) == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_before_return_after_training():
    before = signal.getsignal(signal.SIGTERM)
    with catch_stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
