"""Measure one part of a bench in this process.

A part is some whole steps of the training loop on random weights, without checkpoints.
"""

import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gpu_trace
from gpu_machine import Sensors


@dataclass(frozen=True)
class Part:
    """A named measurement. The parts of one script differ in their overrides."""

    name: str
    asked: tuple[str, ...]  # overrides of the config, without those of the corpus
    corpus: str = "long"


@dataclass(frozen=True)
class Steps:
    """The numbers of warm-up steps and of timed steps of a part; a traced one may follow."""

    warm_up: int
    timed: int


# Every part: nothing is logged, for a logged step computes norms that are due every few steps only.
_ALWAYS = (
    "study=bench",
    "name=gpu",
    "track.wandb=off",
    "schedule.warmup_tokens=0",
    "train.log_every_steps=1000000",
)
# The sizes of the tests' smallest model (tests/conftest.py), for a rehearsal on CPU.
_TINY = (
    "model=tiny",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "train.cuda_graph=off",
    "train.global_batch_size=2",
)


class Done(Exception):
    """The last step of the measurement has been taken."""


class Watch:
    """The hook that times each step, traces the last one if required, and ends the run after it."""

    def __init__(self, steps: int, trace_to: Path | None = None):
        self.steps = steps
        self.trace_to = trace_to
        self.ends: list[float] = []  # time.perf_counter with the GPU done with everything
        self.losses: list[float] = []
        self.trace_error: str | None = None
        self._profile = None

    def after_step(self, loss: float) -> None:
        """Record the end of a step; raise Done after the last one."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(loss)
        if self.trace_to and len(self.ends) >= self.steps - 1:
            try:
                self._trace()
            except Exception as error:  # what was timed is not lost with the trace
                self.trace_error = f"{type(error).__name__}: {error}"
        if len(self.ends) == self.steps:
            raise Done

    def _trace(self) -> None:
        """Begin a trace before the last step, and write it after it."""
        import torch

        if self._profile:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.trace_to))
            return
        kind = torch.profiler.ProfilerActivity
        on = kind.CUDA if torch.cuda.is_available() else kind.CPU
        self._profile = torch.profiler.profile(activities=[on])
        self._profile.start()

    def milliseconds(self) -> list[float]:
        """Return the duration of each step after the first, from the end of the one before."""
        return [1000 * (end - start) for start, end in zip(self.ends, self.ends[1:])]


def overrides(part: Part, corpora: Path, steps: int, *, tiny: bool) -> list[str]:
    """Return the overrides of a config that trains at least one step more than `steps`.

    The last step of the run would be saved and scored.
    """
    corpus = "short" if tiny and part.corpus == "long" else part.corpus
    folder = corpora / corpus
    asked = [*_ALWAYS, *part.asked, *(_TINY if tiny else ())]
    if tiny:
        asked = [text.replace("precision=fp8_tensorwise", "precision=fp32") for text in asked]
        asked += [f"model.max_sequence_length={_seq_length(folder)}", "schedule.warmup_tokens=0"]
        asked += [f"train.micro_batch_size={min(2, _number(asked, 'train.micro_batch_size'))}"]
    batch = _number(asked, "train.global_batch_size")
    asked += [f"train.tokens={(steps + 1) * batch * _seq_length(folder)}"]
    asked += ["data=demo_code", f"data.name={corpus}", f"data.path={folder}"]
    return [
        *asked,
        f"data.tokenizer={corpora / 'tokenizer'}",
        f"data.seq_length={_seq_length(folder)}",
    ]


def _number(asked: list[str], key: str) -> int:
    """Return the last value of this key in the overrides."""
    return next(
        int(text.partition("=")[2]) for text in reversed(asked) if text.startswith(f"{key}=")
    )


def _seq_length(corpus: Path) -> int:
    from retemper.pipeline.corpus.manifest import read_manifest

    return read_manifest(str(corpus))["seq_length"]


def train(asked: list[str], watch: Watch, *, random_weights: bool) -> None:
    """Train by the loop until `watch` has its steps. random_weights: drawn on the device, as they
    would take a minute for 7B on the host; else those that a run begins with. Raises what the
    run raises.
    """
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.distributed import topology

    topology.prepare_megatron()
    from retemper.pipeline.checkpoint import base
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.checkpoint.state import TrainState
    from retemper.pipeline.model import build
    from retemper.pipeline.model.kernels import check_precision
    from retemper.pipeline.train import loop
    from retemper.pipeline.train.log import Log

    log_step = Log.step

    def step(log: Log, result) -> None:
        watch.after_step(result.loss)
        log_step(log, result)

    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        config = load_config([*asked, f"runs_dir={runs}"])
        check_precision(config)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(mock.patch.object(Checkpointer, "restore", lambda _self: TrainState()))
        stack.enter_context(mock.patch.object(base, "record", lambda *_: None))
        stack.enter_context(mock.patch.object(Log, "step", step))
        if random_weights:
            stack.enter_context(
                mock.patch.object(build, "init_weights", lambda model, *_: _draw(model))
            )
        place = topology.start(config.parallel)
        with contextlib.suppress(Done):
            loop.train(config, place, {})
        # Not after an error: on a GPU after a failed capture, ending the groups can hang.
        topology.stop(leave=False)


def _draw(model) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)


@contextlib.contextmanager
def memory() -> Iterator[dict]:
    """Yield a record of memory in GiB: the peaks within the context, and what remains at its end.

    The values are set when the context ends; they are None without a GPU.
    """
    import torch

    figures: dict = {
        "peak_allocated_gib": None,
        "peak_reserved_gib": None,
        "left_allocated_gib": None,
    }
    gc.collect()
    if not torch.cuda.is_available():
        yield figures
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        yield figures
    finally:
        figures["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        gc.collect()
        torch.cuda.empty_cache()
        figures["left_allocated_gib"] = torch.cuda.memory_allocated() / 2**30


def measure(
    part: Part, corpora: Path, steps: Steps, sensors: Sensors, *, traced: bool, tiny: bool
) -> dict:
    """Measure a part and return its record.

    Raises what the run raises, such as UserError for an invalid config.
    """
    from retemper.pipeline.config.compose import load_config

    steps = Steps(1, 1) if tiny else steps
    taken = steps.warm_up + steps.timed + traced
    asked = overrides(part, corpora, taken, tiny=tiny)
    config = load_config([*asked, "runs_dir=unused"])
    with tempfile.TemporaryDirectory() as folder, memory() as held:
        trace = Path(folder, "trace.json")
        watch = Watch(taken, trace if traced else None)
        train(asked, watch, random_weights=True)
        of_trace = _of_trace(trace, watch, config) if traced else None
    first = watch.ends[steps.warm_up - 1]
    last = watch.ends[steps.warm_up + steps.timed - 1]
    of_steps = watch.milliseconds()[steps.warm_up - 1 : steps.warm_up - 1 + steps.timed]
    record = {
        "asked": list(part.asked),
        **_about(config),
        **speed(config, statistics.median(of_steps)),
    }
    record |= (
        {"step_ms_of_each": [round(ms, 2) for ms in of_steps]} | held | sensors.between(first, last)
    )
    if of_trace and "busy_ms" in of_trace:
        # A traced step is slower: how long the GPU waits is told from the steps without a trace.
        of_trace["idle_ms"] = record["step_ms"] - of_trace["busy_ms"]
    return record | {"losses": watch.losses, "trace": of_trace}


def _of_trace(trace: Path, watch: Watch, config) -> dict:
    """Return the summary of the last step's trace, or the error that prevented the trace."""
    if watch.trace_error:
        return {"error": watch.trace_error}
    events = gpu_trace.read(trace)
    found = gpu_trace.summary(events, adapters_below_us=_smallest_product_us(config))
    return {"step_ms": watch.milliseconds()[-1], **found}


def _about(config) -> dict:
    lora = config.method.lora
    return {
        "method": config.method.name,
        "precision": config.precision,
        "kernel": lora.kernel if lora else None,
        "cuda_graph": config.train.cuda_graph,
        "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
        "seq_length": config.data.seq_length,
        "num_layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
    }


def speed(config, step_ms: float) -> dict:
    """Return tokens/s, model FLOP/s, and MFU, from the time of a step.

    The MFU needs a known peak of the GPU.
    """
    import torch

    from retemper.pipeline.estimate.flops import flops_per_token
    from retemper.pipeline.estimate.gpus import peak_flops

    rate = config.tokens_per_step / step_ms * 1000
    done = rate * flops_per_token(config.model, config.method.lora, config.data.seq_length)
    peak = peak_flops(
        torch.cuda.get_device_name() if torch.cuda.is_available() else None, config.precision
    )
    return {
        "tokens_per_second": rate,
        "step_ms": step_ms,
        "model_tflops": done / 1e12,
        "mfu": done / peak if peak else None,
    }


def _smallest_product_us(config) -> float:
    """Return the time of the smallest product of a frozen layer in 16 bits at the GPU's peak.

    It is 0 without adapters or a known peak.
    """
    import torch

    from retemper.pipeline.estimate.gpus import peak_flops
    from retemper.pipeline.schema.shapes import linear_layers

    peak = peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else None, "bf16")
    if not (peak and config.method.lora):
        return 0.0
    sizes = linear_layers(config.model)
    # One layer takes q, k and v, another gate and up.
    together = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    least = min(sum(sizes[name][0] * sizes[name][1] for name in names) for names in together)
    return 2e6 * least * config.train.micro_batch_size * config.data.seq_length / peak
