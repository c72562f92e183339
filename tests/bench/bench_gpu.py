"""Everything that asks for a GPU, on one of them, within ten minutes: written to bench/gpu.json with hardware, versions and commit.

    python tests/bench/bench_gpu.py corpora FOLDER        once, on any machine: real text, tokenized
    python tests/bench/bench_gpu.py FOLDER [PART ...]     on the machine with the GPU: everything, or these parts again

Tests: `pytest -m gpu`. Speed: a model of Llama-2-7B's shape, random weights, samples of 4096, whole steps of the training loop; full
training with AdamW does not fit one GPU of 80 GB, so it has half the layers there, and with more memory Lion. Curves: a model of 85M
parameters on real text, 300 steps in bf16 and in FP8. Each measurement is a process of its own; one that fails says so in its place. What is not timed (tests,
curves) runs at the same time.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "gpu.json"
LONG, SHORT = 4096, 512
STEPS, WARM_UP, CURVE = 3, 1, 300
SECONDS = {"all": 570, "one": 45, "speed": 75, "curve": 150, "tests": 180}  # at most; one: below which nothing is begun


def of_batches(samples: int) -> list[str]:
    return [f"train.global_batch_size={samples}", f"train.tokens={STEPS * samples * LONG}"]


SEVEN_B = ["model=llama2_7b", "train.micro_batch_size=1", *of_batches(16)]
SMALL = ["model.num_layers=12", "model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_attention_heads=12"]
SMALL += ["model.num_query_groups=12", f"model.max_sequence_length={SHORT}", "train.micro_batch_size=32", "train.global_batch_size=32"]
SMALL += [f"train.tokens={CURVE * 32 * SHORT}", "optimizer.lr=6e-4", f"schedule.warmup_tokens={30 * 32 * SHORT}", "model.vocab_size=2048"]
LORA = ["method=lora", "init_from=unread", "optimizer.lr=1e-4", *of_batches(8)]
HALF = ["model.num_layers=16"]


def main(arguments: list[str]) -> None:
    match arguments:
        case ["corpora", folder]:
            make_corpora(Path(folder))
        case ["child", *overrides]:
            print(json.dumps(child(overrides)))
        case [folder, *parts]:
            measure(Path(folder), parts)
        case _:
            sys.exit(__doc__)


def make_corpora(folder: Path) -> None:
    from retemper.pipeline.config import load_data_config
    from retemper.tokenize.job import tokenize
    from retemper.tokenize.sources import read_documents
    from retemper.tokenize.tokenizer import train_tokenizer

    asked = {length: load_data_config(of_corpus(folder, length)) for length in (LONG, SHORT)}
    train_tokenizer((document.text for document in read_documents(asked[SHORT].source)), 2048, folder / "tokenizer")
    for data in asked.values():
        tokenize(data)


def of_corpus(folder: Path, length: int) -> list[str]:
    asked = ["data=demo_code", f"data.path={folder / str(length)}", f"data.tokenizer={folder / 'tokenizer'}"]
    return [*asked, f"data.seq_length={length}", "data.source.path=stdlib"]


def measure(folder: Path, asked: list[str]) -> None:
    """All parts, or those that are asked for beside what an earlier result has of others."""
    import torch

    started, whole = time.monotonic(), torch.cuda.mem_get_info()[1] / 2**30 > 120
    timed = {name: lambda asked=asked: in_process(folder, LONG, [*SEVEN_B, *asked], "speed") for name, asked in of_speed(whole).items()}
    curves = {precision: [f"precision={precision}"] for precision in ("bf16", "fp8_tensorwise", "fp8_delayed")}
    untimed = {f"curve {name}": lambda asked=asked: in_process(folder, SHORT, [*SMALL, *asked], "curve") for name, asked in curves.items()}
    untimed["tests"] = run_tests
    if unknown := set(asked) - {*timed, *untimed}:
        sys.exit(f"no such parts: {', '.join(sorted(unknown))}; there are {', '.join((*timed, *untimed))}")
    here = {"machine": machine(), "layers of full training": 32 if whole else 16}
    report = json.loads(RESULT.read_text()) if RESULT.exists() and asked else {}

    def keep(name: str, part: dict) -> None:  # at once, whatever comes
        report.update(here | {name: part | {"commit": commit()}, "compared": compare(report | here | {name: part})})
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(report, indent=2) + "\n")

    with ThreadPoolExecutor() as together:
        begun = {together.submit(part): name for name, part in untimed.items() if name in asked or not asked}
        for done in as_completed(begun):
            keep(begun[done], done.result())
    for name, part in timed.items():
        if name in asked or not asked:
            left = SECONDS["all"] - (time.monotonic() - started)
            keep(name, part() if left > SECONDS["one"] else {"failed": "no time was left"})
    print(json.dumps({name: part for name, part in report.items() if not name.startswith("curve")}, indent=2))


def of_speed(whole: bool) -> dict[str, list[str]]:
    """Part -> what it asks for. whole: all layers fit full training, with Lion's one moment."""
    full = ["optimizer=lion", "optimizer.lr=1e-5"] if whole else [*HALF, "optimizer.lr=1e-5", "parallel.recompute=selective"]
    fp8, two = "precision=fp8_tensorwise", "train.micro_batch_size=2"
    parts = {
        "full bf16": full,
        "full fp8_tensorwise": [*full, fp8],
        "lora bf16": LORA,
        "lora fp8_tensorwise": [*LORA, fp8],
        "lora bf16, micro-batches of two": [*LORA, two],
        "lora fp8_tensorwise, micro-batches of two": [*LORA, fp8, two],
        "full fp8_delayed": [*full, "precision=fp8_delayed"],
        "lora fp8_tensorwise, recomputed": [*LORA, fp8, "parallel.recompute=selective"],
    }
    return parts if whole else parts | {"lora bf16, shape of full": [*LORA, *HALF]}


def commit() -> str:
    """GIT_COMMIT for a copy that has no history, or another; else that of the checkout."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("GIT_COMMIT") or asked.stdout.strip()


def machine() -> dict:
    from importlib.metadata import version

    import torch

    from retemper.pipeline.model.kernels import kernels_here

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": torch.cuda.mem_get_info()[1] / 2**30,
        "kernels": str(kernels_here()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron-core": version("megatron-core"),
    }


def run_tests() -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS["tests"])
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {SECONDS['tests']} s"}
    return {"said": done.stdout[-2000:]}


def in_process(folder: Path, length: int, overrides: list[str], kind: str) -> dict:
    """What a run of its own measured, or why it measured nothing."""
    with tempfile.TemporaryDirectory() as runs:
        asked = ["study=bench", "name=gpu", f"runs_dir={runs}", "track.wandb=off", "train.log_every_steps=1", "schedule.warmup_tokens=0"]
        command = [sys.executable, __file__, "child", *asked, *of_corpus(folder, length), *overrides]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS[kind])
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {SECONDS[kind]} s"}
    if done.returncode:
        return {"failed": (done.stdout + done.stderr)[-2000:]}
    return summary(json.loads(done.stdout.splitlines()[-1]), kind)


def child(overrides: list[str]) -> list[dict]:
    """Train, without checkpoints: neither read, so that weights are random, nor written. Returns what was logged."""
    from retemper.pipeline import run_folder
    from retemper.pipeline.config import load_config
    from retemper.pipeline.distributed import topology
    from retemper.pipeline.model.kernels import check_precision

    config = load_config(overrides)
    check_precision(config)
    place = topology.start(config.parallel)
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.checkpoint.state import TrainState
    from retemper.pipeline.model import build
    from retemper.pipeline.train import loop, step

    without = [mock.patch.object(Checkpointer, "restore", lambda _self: TrainState())]
    without.append(mock.patch.object(Checkpointer, "save", lambda *_: None))
    if config.data.seq_length == LONG:  # drawn on the host, 7B numbers take a minute; curves begin where a run does
        without.append(mock.patch.object(build, "init_weights", lambda model, *_: draw_on_device(model)))
        without.append(mock.patch.object(step, "norms_of_step", lambda *_: {}))  # due every few steps only, and here every one is logged
    for patch in without:
        patch.start()
    loop.train(config, place, {})
    return list(run_folder.read_metrics(config.run_dir))


def draw_on_device(model) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)


def summary(records: list[dict], kind: str) -> dict:
    if kind == "curve":
        return {"loss": [record["loss"] for record in records]}
    steady = records[WARM_UP:]
    figures = {name: statistics.median(record[name] for record in steady) for name in ("tokens_per_second", "mfu") if name in steady[0]}
    return figures | {"peak_memory_gib": max(record["peak_memory_bytes"] for record in records) / 2**30, "last_loss": records[-1]["loss"]}


def compare(report: dict) -> dict:
    """The ratios that are of interest, of what was measured."""
    parts = {name: part for name, part in report.items() if isinstance(part, dict)}
    rate = {name: part["tokens_per_second"] for name, part in parts.items() if "tokens_per_second" in part}
    pairs = {
        "full, fp8_tensorwise over bf16": ("full fp8_tensorwise", "full bf16"),
        "full, fp8_delayed over bf16": ("full fp8_delayed", "full bf16"),
        "bf16, LoRA over full": ("lora bf16" if report["layers of full training"] == 32 else "lora bf16, shape of full", "full bf16"),
        "LoRA, fp8 over bf16": ("lora fp8_tensorwise", "lora bf16"),
        "LoRA, fp8 over bf16, micro-batches of two": ("lora fp8_tensorwise, micro-batches of two", "lora bf16, micro-batches of two"),
    }
    found = {name: rate[one] / rate[other] for name, (one, other) in pairs.items() if one in rate and other in rate}
    curves = {name: smooth(part["loss"]) for name, part in parts.items() if "loss" in part}
    for name in curves.keys() - {"curve bf16"}:
        if "curve bf16" in curves:
            pairs_of_losses = zip(curves[name], curves["curve bf16"], strict=True)
            found[f"{name}: largest difference from bf16"] = max(abs(one / other - 1) for one, other in pairs_of_losses)
    return found


def smooth(losses: list[float], steps: int = 20) -> list[float]:
    return [statistics.fmean(losses[start : start + steps]) for start in range(len(losses) - steps + 1)]


if __name__ == "__main__":
    main(sys.argv[1:])
