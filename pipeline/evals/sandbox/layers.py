"""Detect the sandbox layers of this machine, and build the command that starts an interpreter."""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox import landlock, seccomp

_PROBE_SECONDS = 30
_HERE = Path(__file__).parent
# The base interpreter of the virtual environment; the environment itself stays invisible.
_INTERPRETER = sys._base_executable  # type: ignore[attr-defined]  # undocumented, not in typeshed
# Imported as a package, and with its folder last in sys.path, so that no module next to inside.py
# shadows the standard library. No name in __main__ leads the candidate to it.
_INSIDE = (
    f"import sys; sys.path.append({str(_HERE.parent)!r}); "
    f"from {_HERE.name}.inside import main; sys.path.pop(); globals().pop('main')()"
)
# The paths that an interpreter needs to read: its own library and the system's.
READABLE = sorted(
    {
        *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib")),
        *(
            f"{root}/{lib}"
            for root in (sys.base_prefix, "", "/usr", "/usr/local")
            for lib in ("lib", "lib64")
        ),
        *(
            "/etc/ld.so.cache",
            "/usr/share/zoneinfo",
            "/dev/urandom",
            "/dev/random",
            "/dev/zero",
            str(_HERE),
        ),
    }
)


@dataclass(frozen=True)
class Layers:
    """The optional layers of the sandbox.

    Resource limits, dropped privileges and an empty environment are always in force.
    """

    landlock: int = 0  # ABI version; 0: not available
    seccomp: bool = False
    bubblewrap: str | None = None  # the path of bwrap if it works

    def __str__(self) -> str:
        names = [f"landlock ABI {self.landlock}"] * (self.landlock > 0) + ["seccomp"] * self.seccomp
        return ", ".join(names + ["bubblewrap"] * (self.bubblewrap is not None)) or "none"

    def command(self, folder: str, code: str = _INSIDE) -> list[str]:
        """Return the command of a bare interpreter, wrapped in bubblewrap if that is available.

        It ignores environment variables and the working folder (-I) and has no site-packages (-S).

        Args:
            folder: The only folder that is writable under bubblewrap.
            code: The source to run.
        """
        prefix = [] if self.bubblewrap is None else _bubblewrap(self.bubblewrap, folder)
        return [*prefix, _INTERPRETER, "-I", "-S", "-X", "utf8", "-c", code]


@cache
def find_layers(unsafe_code: bool = False) -> Layers:
    """Return all sandbox layers of this machine.

    Raises UserError where they are too few to run untrusted programs, unless `unsafe_code`.
    """
    bwrap, reason = _working_bubblewrap()
    layers = Layers(landlock.abi(), seccomp.available(), bwrap)
    if not unsafe_code and not (layers.seccomp and (layers.landlock or layers.bubblewrap)):
        raise UserError(
            "this machine cannot isolate generated programs, so they are not run "
            "(the generations are kept): "
            + (
                ""
                if layers.seccomp
                else "the kernel supports no seccomp filter "
                "(or the machine is neither x86_64 nor aarch64); "
            )
            + (
                ""
                if layers.landlock
                else "the kernel has no Landlock "
                "(it needs Linux 5.13 or later and `landlock` in lsm=); "
            )
            + (f"bubblewrap {reason}; " if reason else "")
            + "score them on a machine with seccomp and either Landlock or bubblewrap "
            "(apt-get install bubblewrap), or set evals.unsafe_code=true to run them "
            "with the available protection only"
        )
    return layers


def _working_bubblewrap() -> tuple[str | None, str]:
    """Return the path of bwrap, or None and the reason why it cannot be used.

    It may be installed but not allowed to create the namespaces that it needs.
    """
    path = shutil.which("bwrap")
    if path is None:
        return None, "is not installed"
    try:
        command = Layers(bubblewrap=path).command("/tmp", "pass")
        probe = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"does not start or respond ({error})"
    return (
        (path, "")
        if probe.returncode == 0
        else (None, f"does not work ({probe.stderr.strip()[-200:]})")
    )


def _bubblewrap(path: str, folder: str) -> list[str]:
    """Return bwrap's part of the command.

    It creates new namespaces of every kind, with a read-only root that contains only the READABLE
    paths, the interpreter and the writable `folder`.
    """
    command = [path, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev"]
    for readable in [*READABLE, str(Path(_INTERPRETER).resolve()), _INTERPRETER]:
        if not readable.startswith("/dev/"):
            command += ["--ro-bind-try", readable, readable]
    command += ["--bind", folder, folder, "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--chdir", folder, "--"]  # it passes its environment on and sets PWD
