"""The end of a process in which torch, megatron-core and their libraries were imported."""

import atexit
import os
import sys
from typing import NoReturn


def exit_now(code: int) -> NoReturn:
    """Exit at once, when everything is closed already.

    This skips interpreter teardown: NCCL and CUDA print spurious errors there.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_without_teardown(code: int) -> NoReturn:
    """Exit after the handlers of `atexit`.

    This skips interpreter teardown, in which libraries print what they have not freed.
    """
    atexit._run_exitfuncs()
    exit_now(code)
