"""Describe the conditions of a measurement.

They are the machine and its libraries, the commit, and the GPU's clock and power during the run.
"""

import contextlib
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit_of_tree() -> dict:
    """Return the checkout's commit, and whether files differ from it, except results of benches.

    Raises an error outside a checkout.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "clean": not _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results"),
    }


def commit_here(file: Path | None = None) -> dict:
    """Return the measured commit, and whether the tree was clean.

    It is what `file` records, if given, because a copy of the tree may have another history.
    Without it, it is commit_of_tree, or else $GIT_COMMIT, which was not compared with the tree.
    """
    if file:
        read = json.loads(file.read_text())
        return {"commit": read["commit"], "clean": read["clean"]}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return commit_of_tree()
    return {"commit": os.environ.get("GIT_COMMIT"), "clean": None}


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def machine() -> dict:
    """Return the GPU, the versions of the libraries, and the environment of a run on one GPU.

    A missing library is None. This sets the environment first: call it before anything starts CUDA.
    """
    from importlib.metadata import version

    import torch

    from retemper.pipeline.distributed import environment
    from retemper.pipeline.schema.model import ParallelConfig

    # The parts of a bench share a process, and one of them may have attention in FP8.
    variables = environment.prepare(ParallelConfig(), tensorwise_attention=True)
    from retemper.pipeline.model.kernels import detect_kernels

    kernels = detect_kernels()
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": kernels.gpu,
        "memory_gib": torch.cuda.mem_get_info()[1] / 2**30 if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn_version() if on_gpu else None,
        "transformer_engine": kernels.transformer_engine,
        "apex": kernels.apex,
        "megatron_core": version("megatron-core"),
        "environment": str(variables),
    }


def _cudnn_version() -> int | None:
    """Return the version of the cuDNN library that this process uses, None without one.

    torch's own function raises an error if that library is not the bundled one.
    """
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libcudnn.so.9").cudnnGetVersion()
    return None


class Sensors:
    """The SM clock and power draw of the first GPU, which nvidia-smi reads five times a second.

    Without nvidia-smi there are no samples.
    """

    _QUERY = (
        "nvidia-smi",
        "--query-gpu=clocks.sm,power.draw",
        "--format=csv,noheader,nounits",
        "-lms",
        "200",
        "-i",
        "0",
    )

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._process = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                self._QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.note(time.perf_counter(), line)

    def note(self, when: float, line: str) -> None:
        """Keep one line, as "1980, 690.12", unless it holds no numbers."""
        with contextlib.suppress(ValueError):
            clock, power = (float(value) for value in line.split(","))
            self._samples.append((when, clock, power))

    def between(self, start: float, end: float) -> dict:
        """Return the median MHz and W of the samples between two readings of time.perf_counter.

        Both are None without samples.
        """
        within = [sample for sample in list(self._samples) if start <= sample[0] <= end]
        if not within:
            return {"sm_clock_mhz": None, "power_w": None}
        _, clocks, powers = zip(*within, strict=True)
        return {"sm_clock_mhz": statistics.median(clocks), "power_w": statistics.median(powers)}

    def close(self) -> None:
        """End nvidia-smi."""
        if self._process:
            self._process.terminate()
            self._process.wait(10)
