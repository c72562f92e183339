"""Check correctness on a GPU: tests, loss curves, and paths that must be equal.

Each check runs in a separate process.

tests: `pytest -m gpu` of each selection. curve: a model of 85M parameters on real text, 300 steps;
FP8 beside bf16, and bf16 on two more orders of the data from the same initial weights, which say
how far apart runs lie that differ in nothing that matters. first steps: 20 steps of the same model,
in full and by LoRA, with a CUDA graph and eager, by the fused adapters and the plain ones.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from gpu_machine import ROOT, commit_here, machine
from gpu_measure import Part, Watch, overrides, train
from gpu_parts import Results, chosen, parser

OUT = ROOT / "benchmarks" / "results" / "gpu-correct.json"
CURVE, FIRST, MEAN = 300, 20, 20  # steps of a curve, of a comparison, and of a mean over a curve
INITIAL_SEED = 17  # of the weights that every run begins with; the data's order comes from `seed`

SMALL = (
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.ffn_hidden_size=2048",
    "model.num_attention_heads=6",  # of 128 features, the only size of FP8 attention on Hopper
)
SMALL += ("model.num_query_groups=6", "model.max_sequence_length=512", "model.vocab_size=2048")
SMALL += ("train.micro_batch_size=32", "train.global_batch_size=32", "optimizer.lr=6e-4")
SMALL += (f"schedule.warmup_tokens={30 * 32 * 512}",)
# At a rate of 1e-2 adapters on random weights diverge, and rounding with them.
LORA = ("method=lora", "init_from=unread", "optimizer.lr=1e-3")

CURVES = {
    "curve-bf16": ("precision=bf16",),
    "curve-fp8_tensorwise": ("precision=fp8_tensorwise",),
    "curve-bf16-order2": ("precision=bf16", "seed=18"),
    "curve-bf16-order3": ("precision=bf16", "seed=19"),
    "curve-fp8_delayed": ("precision=fp8_delayed",),
    "curve-fp8_blockwise": ("precision=fp8_blockwise",),
    "curve-fp8_tensorwise-attention": ("precision=fp8_tensorwise", "fp8.attention=true"),
}
VARIANTS = {
    "full-eager": ("train.cuda_graph=off",),
    "full-graph": ("train.cuda_graph=on",),
    "lora-plain-eager": (*LORA, "method.lora.kernel=plain", "train.cuda_graph=off"),
    "lora-fused-eager": (*LORA, "method.lora.kernel=fused", "train.cuda_graph=off"),
    "lora-fused-graph": (*LORA, "method.lora.kernel=fused", "train.cuda_graph=on"),
    "lora-swiglu-graph": (*LORA, "parallel.recompute=swiglu", "train.cuda_graph=on"),
}
# With an FP8 precision only.
FP8_VARIANTS = {
    "lora-attention-eager": (*LORA, "fp8.attention=true", "train.cuda_graph=off"),
    "lora-attention-graph": (*LORA, "fp8.attention=true", "train.cuda_graph=on"),
}
# What must be equal, in losses of the first steps.
PAIRS = (
    ("full-graph", "full-eager"),
    ("lora-fused-eager", "lora-plain-eager"),
    ("lora-fused-graph", "lora-fused-eager"),
    ("lora-swiglu-graph", "lora-fused-graph"),
    ("lora-attention-eager", "lora-fused-eager"),
    ("lora-attention-graph", "lora-attention-eager"),
)


@dataclass(frozen=True)
class Check:
    """A command that is run for its result: pytest, or a run of this script that writes losses."""

    name: str
    command: tuple[str, ...]
    seconds: float


def main() -> None:
    arguments = parser(__doc__, OUT)
    arguments.add_argument(
        "--tests",
        nargs="*",
        default=["tests/gpu"],
        metavar="SELECTION",
        help="for pytest -m gpu (default tests/gpu)",
    )
    arguments.add_argument(
        "--together", type=int, default=5, help="checks that run at once (default 5)"
    )
    arguments.set_defaults(part_seconds=220)
    arguments.add_argument("--losses", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.losses:
        name, file = asked.losses
        write_losses(name, Path(file), asked)
        return
    checks = {check.name: check for check in all_checks(asked)}
    run(asked, [checks[name] for name in chosen([*checks], asked.parts)])


def all_checks(asked: argparse.Namespace) -> list[Check]:
    """Return all checks, the most important first."""
    precisions = ("fp32",) if asked.tiny else ("bf16", "fp8_tensorwise")
    marked = "not gpu" if asked.tiny else "gpu"
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked)
    tests = [
        Check(f"tests {selection}", (*pytest, *shlex.split(selection)), asked.part_seconds)
        for selection in asked.tests
    ]
    curves = [name for name in CURVES if not (asked.tiny and "fp8" in name)]
    names = [f"first-{precision}" for precision in precisions] + curves
    this = (sys.executable, *sys.argv, "--losses")
    return tests + [Check(name, (*this, name), asked.part_seconds) for name in names]


def run(asked: argparse.Namespace, checks: list[Check]) -> None:
    """Run several checks at once, record each when it ends, and then their comparison."""
    deadline = time.monotonic() + asked.seconds
    results = Results(asked.out)
    commit = commit_here(asked.commit_file)
    with ThreadPoolExecutor(asked.together) as together:
        begun = {together.submit(one, check, deadline): check.name for check in checks}
        for done in as_completed(begun):
            record = done.result()
            results.put(begun[done], record | commit)
            print(f"{begun[done]}: {_in_short(record)}", flush=True)
    compared = compare(results.read()["parts"])
    results.put("compared", compared)
    print(json.dumps(compared, indent=1))


def one(check: Check, deadline: float) -> dict:
    """Run a check and return its record: "losses", "passed" and "said" for tests, or "error"."""
    seconds = min(check.seconds, deadline - time.monotonic())
    if seconds < 5:
        return {"error": "no time was left"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "losses.json")
        writes_losses = "--losses" in check.command
        command = [*check.command, *([str(file)] if writes_losses else [])]
        code, said = _run(command, seconds, Path(folder, "said"))
        record = {"seconds": round(time.monotonic() - started, 1)}
        if file.exists():
            record |= json.loads(file.read_text())
        if code is None:
            return record | {"error": f"not done after {seconds:.0f} s\n{said[-2000:]}"}
        if not writes_losses:
            return record | {"passed": code == 0, "said": said[-6000:]}
        return record | ({"error": said[-3000:]} if code else {})


def _run(command: list[str], seconds: float, output: Path) -> tuple[int | None, str]:
    """Run a command and return its exit status and output.

    The status is None after a timeout. Ranks that the command started end with it.
    """
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, output.read_text(errors="replace")


def _in_short(record: dict) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    if "said" in record:
        return "passed" if record["passed"] else f"failed: {record['said']}"
    return f"{record['seconds']} s"


def write_losses(name: str, file: Path, asked: argparse.Namespace) -> None:
    """Write the losses of a curve, or of each variant of the first steps.

    This runs in a separate process. A variant that fails is recorded with its error.
    """
    record: dict = {"machine": machine()}
    if name in CURVES:
        record["losses"] = losses(CURVES[name], 2 * FIRST if asked.tiny else CURVE, asked)
    else:
        record["variants"] = {}
        precision = (f"precision={name.removeprefix('first-')}",)
        variants = VARIANTS | (FP8_VARIANTS if "fp8" in name else {})
        for variant, of_variant in variants.items():
            try:
                record["variants"][variant] = {
                    "losses": losses((*precision, *of_variant), FIRST, asked)
                }
            except Exception as error:
                record["variants"][variant] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            file.write_text(json.dumps(record))
    file.write_text(json.dumps(record))
    sys.stdout.flush()
    os._exit(0)  # after an error on the GPU, leaving its process group can hang


def losses(asked: tuple[str, ...], steps: int, arguments: argparse.Namespace) -> list[float]:
    """Return the losses of the first steps of the small model.

    The initial weights are those of INITIAL_SEED, whatever `seed` orders the data.
    """
    from retemper.pipeline.distributed import topology

    topology.prepare_megatron()
    from retemper.pipeline.model import build

    part = Part("losses", (*SMALL, *asked, *arguments.set), "short")
    config = overrides(part, arguments.corpora, max(steps, CURVE), tiny=arguments.tiny)
    init_weights = build.init_weights
    watch = Watch(steps)
    with mock.patch.object(
        build, "init_weights", lambda model, shape, _seed: init_weights(model, shape, INITIAL_SEED)
    ):
        train(config, watch, random_weights=False)
    return watch.losses


def compare(parts: dict) -> dict:
    """Return the largest relative differences of all parts that ran.

    Curves are compared with bf16's in means of MEAN steps, as are bf16's own orders of the data
    with each other; pairs are compared step by step over the first steps.
    """
    curves = {
        name: smooth(part["losses"])
        for name, part in parts.items()
        if name.startswith("curve-") and "losses" in part
    }
    of_bf16 = [curve for name, curve in curves.items() if name.startswith("curve-bf16")]
    found = {}
    for name, curve in curves.items():
        if "curve-bf16" in curves and not name.startswith("curve-bf16"):
            found[name] = largest_difference(curve, curves["curve-bf16"])
    if len(of_bf16) > 1:
        found["spread of bf16 over orders of the data"] = max(
            largest_difference(*pair) for pair in itertools.combinations(of_bf16, 2)
        )
    for name, part in parts.items():
        ran = {
            variant: record["losses"]
            for variant, record in part.get("variants", {}).items()
            if "losses" in record
        }
        for one_of, other in PAIRS:
            if one_of in ran and other in ran:
                found[f"{name}: {one_of} against {other}"] = largest_difference(
                    ran[one_of], ran[other]
                )
    return found


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Return the largest difference relative to `others`, which has the same length."""
    return max(abs(loss / other - 1) for loss, other in zip(losses, others, strict=True))


def smooth(losses: list[float], steps: int = MEAN) -> list[float]:
    """Return the moving means over `steps` losses."""
    return [
        statistics.fmean(losses[start : start + steps]) for start in range(len(losses) - steps + 1)
    ]


if __name__ == "__main__":
    main()
