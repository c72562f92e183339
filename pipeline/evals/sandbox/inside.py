"""The code in the candidate's process: confine the process, run the program, report how it ended.

It runs in a bare interpreter that finds only this folder, so it imports only the standard library
and the modules next to it. It reports to the pipe that is its standard error: first READY, then
the nonce if the program ran to its end, otherwise the reason why not.
"""

import builtins
import marshal
import os
import sys

from . import confine, landlock, seccomp

# Output before this line is an error of the sandbox; output after it is the candidate's.
READY = b"sandbox ready\n"


def main() -> None:
    """Run the request on standard input, report on standard error, and exit. Never returns."""
    request = marshal.loads(sys.stdin.buffer.read())
    nonce = request.pop("nonce")
    # The candidate can replace these functions in their module, but not in this frame.
    write, exit_now = os.write, os._exit
    pipe = os.dup(2)
    _close_standard_streams()
    try:
        _confine(request)
    except Exception as error:
        write(pipe, f"{type(error).__name__}: {error}".encode())
        exit_now(1)
    write(pipe, READY)
    failure = _run(request["source"])
    write(pipe, nonce if failure is None else failure.encode(errors="replace"))
    exit_now(0)


def _close_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)


def _confine(request: dict) -> None:
    confine.die_with(request["parent"])
    confine.drop_privileges()
    confine.set_limits(**request["limits"])
    if request["landlock"]:
        landlock.restrict(request["landlock"], request["readable"], request["folder"])
    if request["seccomp"]:
        seccomp.install()


def _run(source: str) -> str | None:
    """Run the program. Returns the reason of its failure, or None if it ran to its end.

    It runs in an empty namespace, as in bigcode's harness, so `__name__` is not "__main__".
    """
    original_builtins = dict(vars(builtins))
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), {})
    except BaseException as error:
        return _describe(error)
    if any(vars(builtins).get(name) is not value for name, value in original_builtins.items()):
        return "forged: the program replaced a builtin, which the tests may use"
    return None


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # __str__ may be the candidate's code
        return "an exception that cannot be printed"
