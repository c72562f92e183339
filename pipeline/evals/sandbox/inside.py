"""The code in the candidate's process: confine the process, run the program, report how it ended.

It runs in a bare interpreter that finds only this folder, so it imports only the standard library
and the modules next to it. It reports to the pipe that is its standard error: first READY, then
the nonce if the program ran to its end, otherwise the reason why not. The control reports only what
it finds (control.py).
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
from types import CodeType, ModuleType

from . import comparisons, confine, landlock, seccomp

TYPE_CHECKING = False  # importing collections would take longer than the rest of the start-up
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The candidate can replace builtins, but not for the functions below.
__builtins__ = vars(builtins).copy()  # type: ignore[assignment]

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

    def report_forgery() -> None:
        write(pipe, b"forged: an answer also passes tests that cannot be passed")
        exit_now(1)

    failure = _run(request, report_forgery)
    if failure is not None:
        write(pipe, failure.encode(errors="replace"))
    elif not request["is_control"]:
        write(pipe, nonce)
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


def _run(request: dict, report_forgery: Callable[[], None]) -> str | None:
    """Run the program. Returns the reason of its failure, or None if it ran to its end.

    It runs in an empty namespace, as in bigcode's harness, so `__name__` is not "__main__".
    """
    modules = [builtins, *_imported(request["modules"])]
    originals = list(map(_public, modules))
    namespace = {"__builtins__": vars(builtins)}
    _hide_sandbox()
    try:
        exec(_compiled(request["candidate"]), namespace)
        # The tests use Python's builtins, also where the candidate has functions of these names.
        seen = {name: namespace[name] for name in namespace.keys() - set(request["builtins"])}
        tests = _compiled(request["tests"])
        exec(comparisons.bind(tests, report_forgery), seen)
    except BaseException as error:
        return _describe(error)
    if any(map(_changed, modules, originals)):
        return "forged: the program replaced a function that the tests may use"
    return None


def _imported(names: list[str]) -> Iterator[ModuleType]:
    for name in names:
        try:
            __import__(name)
        except ImportError:  # the tests will say so
            continue
        yield sys.modules[name]


def _public(module: ModuleType) -> dict:
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("__") or not name.startswith("_")
    }


def _changed(module: ModuleType, original: dict) -> bool:
    return any(vars(module).get(name) is not value for name, value in original.items())


def _hide_sandbox() -> None:
    """Remove the names by which the candidate could import, and change, what judges it."""
    package = __name__.partition(".")[0]
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]


def _compiled(source: str) -> CodeType:
    return compile(source, "<program>", "exec", dont_inherit=True)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # __str__ may be the candidate's code
        return "an exception that cannot be printed"
