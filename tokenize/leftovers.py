"""The semaphores and sockets of a job's worker processes, which a kill of all of them leaves."""

import hashlib
import multiprocessing.process
import multiprocessing.util
import shutil
import tempfile
from pathlib import Path


def name_after(work: Path) -> None:
    """Name the semaphores and sockets of this process after a job, and remove what it left.

    A killed job leaves them in /dev/shm and in the folder of temporary files; its next start comes
    here. A process that runs several jobs keeps the names of its first one.

    Args:
        work: The job's folder. The caller holds its lock, so no other process uses these names.
    """
    name = f"retemper-{hashlib.sha256(bytes(work)).hexdigest()[:12]}"
    # multiprocessing has no public way to choose these names.
    settings = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    in_use = settings.get("tempdir")
    for path in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        if str(path) != in_use:
            shutil.rmtree(path, ignore_errors=True)
    if in_use is not None:
        return
    for semaphore in Path("/dev/shm").glob(f"sem.{name}-*"):
        semaphore.unlink(missing_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
    settings["tempdir"] = folder
    settings["semprefix"] = f"/{name}"
