"""Run the parts of a bench one after another within a time limit.

They share one process, because imports and compilation take half a minute.

A part's record is written the moment it exists. One that raises has the error's text for a record,
and the next goes on. A process that does not end a part in time, dies in it or keeps its memory is
replaced by another, which takes the parts that are left.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from gpu_machine import Sensors, commit_here, machine
from gpu_measure import Part, Steps, measure

_ERROR = 3000  # characters kept of an error
_LEFT_GIB = 1.0  # of GPU memory that a part may leave behind for the next to have true peaks


class Results:
    """The records by name in a JSON file, beside those of earlier runs."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict:
        """Return {"parts": {name: record}}."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"parts": {}}

    def put(self, name: str, record: dict) -> None:
        """Replace one record; the file is never half written."""
        results = self.read()
        results["parts"][name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(self.path)


def parser(text: str, out: Path) -> argparse.ArgumentParser:
    """Return the arguments that every bench on a GPU has.

    Args:
        text: the script's description.
    """
    arguments = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("corpora", type=Path, help="the folder that `bench_gpu.py corpora` made")
    arguments.add_argument(
        "--seconds", type=float, default=240, help="after which nothing runs any more (default 240)"
    )
    arguments.add_argument(
        "--part-seconds", type=float, default=120, help="of one part at most (default 120)"
    )
    arguments.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, in this order")
    arguments.add_argument(
        "--out",
        type=Path,
        default=out,
        help=f"the results (default results/{out.name})",
    )
    arguments.add_argument(
        "--commit-file",
        type=Path,
        help="what `bench_gpu.py commit` wrote; read where there is no git",
    )
    arguments.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides for every part, as model.num_layers=16",
    )
    arguments.add_argument(
        "--tiny",
        action="store_true",
        help="a rehearsal on CPU, with the tests' smallest model and without FP8",
    )
    return arguments


def chosen(names: list[str], asked: list[str] | None) -> list[str]:
    """Return the requested names, or all; exit with a message on an unknown name."""
    if unknown := set(asked or ()) - set(names):
        sys.exit(f"no such parts: {', '.join(sorted(unknown))}; there are\n  " + "\n  ".join(names))
    return asked or names


def main(text: str, out: Path, parts: list[Part], steps: Steps, shortest: float) -> None:
    """Run a whole script from the command line.

    Args:
        shortest: seconds below which no further part is started.
    """
    arguments = parser(text, out)
    arguments.add_argument(
        "--trace",
        nargs="+",
        default=["yes"],
        metavar="NAME",
        help="yes, no, or the parts that are traced (default yes)",
    )
    arguments.add_argument("--worker", type=Path, metavar="PROGRESS", help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.tiny:
        parts = [
            part
            for part in parts
            if not any(
                text.startswith("fp8.") or text == "precision=fp8_delayed" for text in part.asked
            )
        ]
    known = {part.name: Part(part.name, (*part.asked, *asked.set), part.corpus) for part in parts}
    names = chosen([*known], asked.parts)
    if asked.trace not in (["yes"], ["no"]):
        chosen([*known], asked.trace)
    if asked.worker:
        work(asked, [known[name] for name in names], steps, shortest)
    else:
        supervise(asked, names, shortest)


def supervise(asked: argparse.Namespace, names: list[str], shortest: float) -> None:
    """Start processes for the parts until all were begun or the time is over."""
    deadline = time.monotonic() + asked.seconds
    results = Results(asked.out)
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(names)
        while waiting and (left := deadline - time.monotonic()) > shortest:
            progress = Path(folder, "progress")
            said = Path(folder, "said")
            progress.write_text("")
            ended = _process(waiting, left, progress, said)
            lines = [line.split(" ", 1) for line in progress.read_text().splitlines()]
            begun = [name for what, name in lines if what == "begin"]
            if not begun:
                # Nothing was to be begun where the time ran out in the imports.
                why = ended or "no time was left"
                sys.exit(f"no part was begun: {why}\n{said.read_text()[-_ERROR:]}")
            if lines[-1][0] == "begin":
                failed(
                    results,
                    begun[-1],
                    f"the process ended: {ended}\n{said.read_text()[-_ERROR:]}",
                    commit_here(asked.commit_file),
                )
            waiting = [name for name in waiting if name not in begun]
    if waiting:
        print(f"no time was left for {', '.join(waiting)}", flush=True)


def _process(names: list[str], seconds: float, progress: Path, said: Path) -> str | None:
    """Run the parts in one process and return why it ended, if it ended by itself.

    Args:
        said: the file that receives its stderr.
    """
    command = [
        sys.executable,
        *_without(sys.argv, "--parts", "--seconds"),
        "--worker",
        str(progress),
    ]
    command += ["--seconds", str(seconds), "--parts", *names]
    with open(said, "w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            code = process.wait(seconds + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            return "no time was left"
    return f"exit status {code}" if code else None


def _without(arguments: list[str], *options: str) -> list[str]:
    """Return the arguments without these options and their values."""
    kept = []
    dropping = False
    for argument in arguments:
        name, joined, _ = argument.partition("=")
        if argument.startswith("--"):
            dropping = name in options and not joined
        if not dropping and name not in options:
            kept.append(argument)
    return kept


def work(asked: argparse.Namespace, parts: list[Part], steps: Steps, shortest: float) -> None:
    """Measure one part after another, until the time is over or the GPU's memory is not clean.

    This runs in the measuring process.
    """
    # As torch's own profiler does with CUDA graphs: CUPTI that was torn down crashes when it comes
    # back to one.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    deadline = time.monotonic() + asked.seconds
    results = Results(asked.out)
    about = commit_here(asked.commit_file) | {"machine": machine()}
    sensors = Sensors()
    for part in parts:
        left = deadline - time.monotonic()
        if left < shortest:
            break
        _note(asked.worker, f"begin {part.name}")
        faulthandler.dump_traceback_later(min(left, asked.part_seconds), exit=True)
        started = time.monotonic()
        clean = True
        try:
            traced = asked.trace == ["yes"] or part.name in asked.trace
            record = measure(part, asked.corpora, steps, sensors, traced=traced, tiny=asked.tiny)
            record["seconds"] = round(time.monotonic() - started, 1)
            results.put(part.name, record | about)
            print(
                f"{part.name}: {record['tokens_per_second']:,.0f} tokens/s, {record['seconds']} s",
                flush=True,
            )
        except Exception as error:
            failed(results, part.name, _text_of(error), about)
            clean = False
        faulthandler.cancel_dump_traceback_later()
        _note(asked.worker, f"end {part.name}")
        if not (clean and _is_clean()):
            # The process is replaced: an error may have left groups or the GPU unusable.
            break
    sensors.close()
    sys.stdout.flush()
    os._exit(0)  # after an error on the GPU, leaving its process group can hang


def failed(results: Results, name: str, error: str, about: dict) -> None:
    """Record the text of an error as a part's result."""
    results.put(name, {"error": error[-_ERROR:]} | about)
    print(f"{name} failed: {error[-_ERROR:]}", flush=True)


def _text_of(error: Exception) -> str:
    from retemper.pipeline.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    return "".join(traceback.format_exception(error))


def _is_clean() -> bool:
    """Return whether the GPU responds and the memory of the part before is free."""
    import gc

    import torch

    if not torch.cuda.is_available():
        return True
    with contextlib.suppress(Exception):
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**30 < _LEFT_GIB
    return False


def _note(progress: Path, line: str) -> None:
    with open(progress, "a") as file:
        file.write(line + "\n")
