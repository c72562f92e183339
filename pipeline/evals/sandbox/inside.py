"""What runs in the candidate's own process: shut every door, say so, run the program, say how it ended.

Started by a bare interpreter that finds only this folder, so it imports the standard library and its neighbours alone. What
it says goes to the pipe it was given as standard error: first READY, then the nonce where the program ran to its end, else
why it did not.
"""

import builtins
import marshal
import os
import sys

from . import confine, landlock, seccomp

READY = b"the doors are shut\n"  # before it, what comes is an error of ours; after it, the candidate's doing


def main() -> None:
    """Never returns."""
    request = marshal.loads(sys.stdin.buffer.read())
    nonce = request.pop("nonce")
    # The candidate may replace these in their modules, not in this frame.
    write, leave = os.write, os._exit
    pipe = os.dup(2)
    _close_standard_streams()
    try:
        _shut_doors(request)
    except Exception as error:
        write(pipe, f"{type(error).__name__}: {error}".encode())
        leave(1)
    write(pipe, READY)
    failure = _run(request["source"])
    write(pipe, nonce if failure is None else failure.encode(errors="replace"))
    leave(0)


def _close_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)


def _shut_doors(request: dict) -> None:
    confine.die_with(request["parent"])
    confine.drop_privileges()
    confine.set_limits(**request["limits"])
    if request["landlock"]:
        landlock.restrict(request["landlock"], request["readable"], request["folder"])
    if request["seccomp"]:
        seccomp.install()


def _run(source: str) -> str | None:
    """Why the program failed; None where it ran to its end.

    In an empty namespace as bigcode's harness has it, so that `__name__` is not "__main__".
    """
    built_in = dict(vars(builtins))
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), {})
    except BaseException as error:
        return _describe(error)
    if any(vars(builtins).get(name) is not value for name, value in built_in.items()):
        return "forged: the program replaced what the tests are made of (builtins)"
    return None


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # its __str__ is the candidate's
        return "an exception that cannot be printed"
