"""Start and stop a Slurm cluster of this one machine for tests.

munged, slurmctld and slurmd are those of the Debian packages.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo")


def missing() -> str | None:
    """Return why no cluster can run on this machine, or None."""
    absent = [
        name
        for name in NEEDED
        if shutil.which(name) is None and not Path("/usr/sbin", name).exists()
    ]
    if absent:
        return f"Slurm is not installed: {', '.join(absent)}"
    return None if os.geteuid() == 0 else "starting Slurm's daemons takes root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; yields the environment in which sbatch and squeue find it."""
    with contextlib.ExitStack() as stack:
        key = Path("/etc/munge/munge.key")
        if not key.exists():
            key.write_bytes(os.urandom(128))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
        for path in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(path).mkdir(parents=True, exist_ok=True)
            shutil.chown(path, "munge", "munge")
        stack.callback(
            _stop,
            _start(
                ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "-F", "--force"],
                folder / "munged.log",
            ),
        )
        configuration = folder / "slurm.conf"
        configuration.write_text(_configuration(folder))
        environment = os.environ | {"SLURM_CONF": str(configuration)}
        for name in ("slurmctld", "slurmd"):
            stack.callback(
                _stop,
                _start(
                    [f"/usr/sbin/{name}", "-D", "-f", str(configuration)],
                    folder / f"{name}.log",
                    environment,
                ),
            )
        deadline = time.monotonic() + 60
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True
            ).stdout
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    (folder / "slurmctld.log").read_text()[-2000:]
                    + (folder / "slurmd.log").read_text()[-2000:]
                )
            time.sleep(0.5)
        yield environment


def _configuration(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
ReturnToService=2
MpiDefault=none
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    with open(log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
