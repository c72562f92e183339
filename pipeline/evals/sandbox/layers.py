"""Which walls this machine has around a generated program, and the command that puts a bare interpreter behind them."""

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
# The interpreter of the environment's base: the environment itself is not to be seen.
_INTERPRETER = sys._base_executable
# Found from behind its neighbours, so that none of them shadows the standard library.
_INSIDE = f"import sys; sys.path.append({str(_HERE.parent)!r}); from {_HERE.name}.inside import main; sys.path.pop(); main()"
# What an interpreter reads: its library and those of the system.
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
    """What can be put around a program beside limits, lost privileges and an empty environment, which are there always."""

    landlock: int = 0  # its ABI; 0: none
    seccomp: bool = False
    bubblewrap: str | None = None  # the path of bwrap, where it works

    def __str__(self) -> str:
        names = [f"landlock ABI {self.landlock}"] * (self.landlock > 0) + ["seccomp"] * self.seccomp
        return ", ".join(names + ["bubblewrap"] * (self.bubblewrap is not None)) or "none"

    def command(self, folder: str, code: str = _INSIDE) -> list[str]:
        """A bare interpreter: isolated from environment and working folder (-I), without site-packages (-S)."""
        around = [] if self.bubblewrap is None else _bubblewrap(self.bubblewrap, folder)
        return [*around, _INTERPRETER, "-I", "-S", "-X", "utf8", "-c", code]


@cache
def find_layers(unsafe_code: bool = False) -> Layers:
    """All layers of this machine. Raises UserError where they are too few to run strangers' programs, unless `unsafe_code`."""
    bwrap, why_not = _working_bubblewrap()
    layers = Layers(landlock.abi(), seccomp.available(), bwrap)
    if not unsafe_code and not (layers.seccomp and (layers.landlock or layers.bubblewrap)):
        raise UserError(
            "generated programs are not run here, their generations are kept: "
            + (
                ""
                if layers.seccomp
                else "this kernel takes no seccomp filter (or this is neither x86_64 nor aarch64); "
            )
            + (
                ""
                if layers.landlock
                else "it has no Landlock (Linux 5.13 or later, `landlock` among its lsm=); "
            )
            + (f"bubblewrap {why_not}; " if why_not else "")
            + "score them on a machine with seccomp and either of the two (apt-get install bubblewrap), or let them run "
            "with what protection there is by evals.unsafe_code=true"
        )
    return layers


def _working_bubblewrap() -> tuple[str | None, str]:
    """The path of bwrap, or why it cannot be used: it may be there and be refused the namespaces it is made of."""
    path = shutil.which("bwrap")
    if path is None:
        return None, "is not installed"
    try:
        command = Layers(bubblewrap=path).command("/tmp", "pass")
        tried = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"does not answer ({error})"
    return (
        (path, "")
        if tried.returncode == 0
        else (None, f"does not work ({tried.stderr.strip()[-200:]})")
    )


def _bubblewrap(path: str, folder: str) -> list[str]:
    """Its own namespaces of everything, a root of READABLE paths that nobody can write to, and `folder`."""
    command = [path, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev"]
    for readable in [*READABLE, str(Path(_INTERPRETER).resolve()), _INTERPRETER]:
        if not readable.startswith("/dev/"):
            command += ["--ro-bind-try", readable, readable]
    command += ["--bind", folder, folder, "--remount-ro", "/dev", "--remount-ro", "/"]
    # bwrap itself sets PWD.
    return [
        *command,
        "--clearenv",
        "--setenv",
        "HOME",
        folder,
        "--setenv",
        "TMPDIR",
        folder,
        "--chdir",
        folder,
        "--",
    ]
