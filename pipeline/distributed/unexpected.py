"""The message of an error that nobody foresaw: one line, and a file with the full trace."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

from retemper.pipeline.errors import masked

DEBUG = "RETEMPER_DEBUG"  # environment variable; ranks inherit it from the command with --debug


def report_unexpected(error: BaseException, folder: Path | None = None) -> str:
    """Write the trace of an error to a file, and return a line that names both.

    Args:
        error: the error; --debug prints its trace, too.
        folder: where to write the file if it exists and has space; else it is a temporary file.
    """
    trace = masked("".join(traceback.format_exception(error)))
    if os.environ.get(DEBUG):
        print(trace, file=sys.stderr, flush=True)
    written = _written(trace, folder)
    place = f"the full trace is in {written}" if written else "--debug prints the full trace"
    return f"{type(error).__name__}: {_first_line(error)}; {_advice(error)}{place}"


def _first_line(error: BaseException) -> str:
    lines = masked(str(error)).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else "without a message"


def _advice(error: BaseException) -> str:
    """Return what to do about a full GPU, and nothing about other errors."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return ""
    return (
        "set a smaller train.micro_batch_size (evals.micro_batch_size if it was in an evaluation), "
        "parallel.recompute=full or a larger parallel.tensor_parallel_size: `retemper plan` "
        "estimates what each needs; "
    )


def _written(trace: str, folder: Path | None) -> Path | None:
    """Return the path of a file with the trace, or None where none can be written."""
    rank = os.environ.get("RANK", "0")
    for parent in filter(None, (folder, Path(tempfile.gettempdir()))):
        try:
            descriptor, name = tempfile.mkstemp(".txt", f"error-rank-{rank}-", parent)
            with open(descriptor, "w", errors="backslashreplace") as file:
                file.write(trace)
            return Path(name)
        except OSError:
            continue
    return None
