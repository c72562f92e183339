"""Measure what the trainer costs: its step, its memory, its start, and LoRA beside full training.

    python benchmarks/bench_train.py [step] [memory] [start] [lora]

All parts run by default, which takes about ten minutes. The times are CPU-seconds on one rank, with
interleaved runs.

- step: the whole loop with reading, logging and ledger, beside megatron-core's bare schedule and
  optimizer step on the same model and batch; the demo's model and data.
- memory: the growth over 300 steps.
- start: a run until its first step is logged, beside the imports of torch and megatron-core alone.
- lora: a model of 119M parameters, r=16, in turn with full training; and the size of their
  checkpoints.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from tiny import TINY

ROUNDS, STEPS_OF_ROUND = (2, 1) if TINY else (12, 4)
# Memory is compared after these numbers of steps, each time the least of a few.
BEFORE, AFTER, A_FEW = (2, 4, 1) if TINY else (400, 700, 25)
STARTS = 1 if TINY else 7
LARGER = [
    f"model.hidden_size={48 if TINY else 1536}",
    f"model.ffn_hidden_size={128 if TINY else 4096}",
    "model.num_layers=4",
    "model.num_attention_heads=12",
]
LARGER += ["model.num_query_groups=12", "train.micro_batch_size=4", "train.global_batch_size=4"]


def main(parts: list[str]) -> None:
    benches = {"step": bench_step, "memory": bench_memory, "start": bench_start, "lora": bench_lora}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        for part in parts or benches:
            benches[part](folder, corpus)


def make_corpus(folder: Path) -> list[str]:
    """Tokenize the demo's corpus and return the overrides of a run on it."""
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.study.demo import _prepare_data

    asked = [
        "run=demo_base",
        "parallel=single",
        f"runs_dir={folder / 'runs'}",
        "evals.heldout={}",
        "track.wandb=off",
        "schedule.warmup_tokens=0",
    ]
    _prepare_data([load_config(asked), load_config(["run=demo_full", *asked[1:]])])
    return asked


class BareSteps:
    """The counterpart of the loop's steps: megatron-core's own step, on the same model and batch.

    It runs a few times after every few steps of the loop, on the loop's model and its last batch.
    """

    def __init__(self):
        self.ours, self.bare, self.done = [], [], 0

    def watch(self, loop):
        """Return patches of `loop` that record what it builds and trains on.

        The calls of the loop itself stay as they are.
        """
        build_optimizer, train_step, stop_requested = (
            loop.build_optimizer,
            loop.train_step,
            loop.stop_requested,
        )

        def noting_optimizer(config, model):
            self.model, self.optimizer = model, build_optimizer(config, model)
            return self.optimizer

        def noting_step(config, state, passes, optimizer, schedule, batches):
            self.batches, self.schedule, self.tokens = batches, schedule, config.tokens_per_step
            return train_step(config, state, passes, optimizer, schedule, batches)

        def after_step():
            stopping = stop_requested()
            self.done += 1
            if self.done % STEPS_OF_ROUND == 0:
                self.ours.append(time.process_time() - self.started)
                self.take_bare_steps()
                self.started = time.process_time()
            return stopping

        self.started = time.process_time()
        return (
            mock.patch.object(loop, "build_optimizer", noting_optimizer),
            mock.patch.object(loop, "train_step", noting_step),
            mock.patch.object(loop, "stop_requested", after_step),
        )

    def take_bare_steps(self) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from retemper.pipeline.model.forward import forward_step

        (stage,) = self.model
        shape = self.batches[0].shape
        started = time.process_time()
        for _ in range(STEPS_OF_ROUND):
            stage.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=iter(self.batches),
                model=stage, num_microbatches=len(self.batches),
                seq_length=shape[1], micro_batch_size=shape[0], forward_only=False,
            )  # fmt: skip
            self.optimizer.step()
            self.schedule.step(self.tokens)
        self.bare.append(time.process_time() - started)


def bench_step(folder: Path, asked: list[str]) -> None:
    bare = BareSteps()
    train(
        [
            *asked,
            "name=step",
            f"train.tokens={(ROUNDS + 1) * STEPS_OF_ROUND * 16 * 256}",
            "train.log_every_steps=1",
            "data.ledger=true",
        ],
        lambda loop: bare.watch(loop),
    )
    ratios = sorted(
        ours / other for ours, other in zip(bare.ours[1:], bare.bare[1:], strict=True)
    )  # the first round warms up
    print(
        f"step    {statistics.median(bare.ours[1:]) / STEPS_OF_ROUND:.3f} CPU-seconds, "
        f"bare megatron-core {statistics.median(bare.bare[1:]) / STEPS_OF_ROUND:.3f}; "
        f"ratio: median {statistics.median(ratios):.3f} "
        f"(min {ratios[0]:.3f}, max {ratios[-1]:.3f}) "
        f"over {len(ratios)} interleaved rounds of {STEPS_OF_ROUND}"
    )


def bench_memory(folder: Path, asked: list[str]) -> None:
    held, small = [], ["train.global_batch_size=4", "train.micro_batch_size=4"]

    def watch(loop):
        stop_requested = loop.stop_requested

        def after_step():
            trim()
            held.append(anonymous_kib())
            return stop_requested()

        return (mock.patch.object(loop, "stop_requested", after_step),)

    train(
        [
            *asked,
            *small,
            "name=memory",
            f"train.tokens={(AFTER + A_FEW) * 4 * 256}",
            "train.log_every_steps=1",
            "schedule.warmup_tokens=0",
        ],
        watch,
    )
    # The least of some steps: the reader's thread may be holding a batch that is read ahead.
    before = min(held[BEFORE : BEFORE + A_FEW])
    after = min(held[AFTER : AFTER + A_FEW])
    print(
        f"memory  {before / 1024:.1f} MiB are held after {BEFORE} steps, {after / 1024:.1f} "
        f"after {AFTER}: {after - before:+d} KiB"
    )


def bench_start(folder: Path, asked: list[str]) -> None:
    imports = (
        "from retemper.pipeline.distributed import topology; topology.prepare_megatron(); "
        "import torch, megatron.core.models.gpt"
    )
    imports += (
        ", megatron.core.dist_checkpointing, megatron.core.distributed, megatron.core.optimizer"
    )
    small = [
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
        "train.tokens=256",
        "schedule.warmup_tokens=0",
    ]

    def to_first_step(name: str) -> float:
        """Return the seconds until the first record is written, after 256 tokens."""
        started = time.time()
        wall(["-m", "retemper.pipeline.train", *asked, *small, f"name={name}"])
        return (folder / "runs" / "demo" / name / "metrics.jsonl").stat().st_mtime - started

    pairs = [(to_first_step(f"start-{number}"), wall(["-c", imports])) for number in range(STARTS)]
    over = sorted(run - imported for run, imported in pairs)
    print(
        f"start   {statistics.median(run for run, _ in pairs):.1f} s "
        "until the first step is logged; "
        f"{statistics.median(imported for _, imported in pairs):.1f} s "
        "of them imports of torch and megatron-core; "
        f"beyond them {statistics.median(over):.1f} s (min {over[0]:.1f}, max {over[-1]:.1f})"
    )


def bench_lora(folder: Path, asked: list[str]) -> None:
    larger = [*asked, *LARGER, "schedule.warmup_tokens=0"]
    train([*larger, "name=large-base", f"train.tokens={4 * 256}"])
    methods = {"full": [], "lora": ["method=lora", "method.lora.rank=16"]}
    seconds: dict[str, list[float]] = {"full": [], "lora": []}

    def watch(name: str):
        def patches(loop):
            train_step = loop.train_step

            def timed(*arguments):
                started = time.process_time()
                result = train_step(*arguments)
                seconds[name].append(time.process_time() - started)
                return result

            return (mock.patch.object(loop, "train_step", timed),)

        return patches

    base = f"init_from={folder / 'runs' / 'demo' / 'large-base'}"
    for number in range(1 if TINY else 3):
        for name, method in methods.items():
            train(
                [*larger, *method, f"name={name}-{number}", base, f"train.tokens={4 * 4 * 256}"],
                watch(name),
            )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    sizes = {
        name: sum(
            path.stat().st_size
            for path in (folder / "runs" / "demo" / f"{name}-0" / "checkpoints").glob("*/*.distcp")
        )
        for name in methods
    }
    print(
        f"lora    full {medians['full']:.2f} CPU-seconds a step, LoRA {medians['lora']:.2f}: "
        f"{medians['full'] / medians['lora']:.2f} times; "
        f"checkpoints {sizes['full'] / 2**20:.0f} and {sizes['lora'] / 2**20:.1f} MiB: "
        f"{sizes['lora'] / sizes['full']:.2%}"
    )


def train(asked: list[str], watch=lambda loop: ()) -> None:
    import contextlib

    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.distributed import topology
    from retemper.pipeline.entry.preflight import preflight

    config = load_config(asked)
    fingerprints = preflight(config)
    place = topology.start(config.parallel)
    from retemper.pipeline.train import loop

    with (
        contextlib.ExitStack() as patched,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        for patch in watch(loop):
            patched.enter_context(patch)
        loop.train(config, place, fingerprints)
    topology.stop(leave=False)


def wall(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def trim() -> None:
    """Return free memory to the system.

    What glibc keeps of it grows in jumps for a thousand steps, and then no more (docs/dev/log.md).
    """
    ctypes.CDLL(None).malloc_trim(0)


def anonymous_kib() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main(sys.argv[1:])
