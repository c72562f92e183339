"""The training log of rank 0: a progress bar, one line per logged step, metrics.jsonl and W&B."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.data.reader import TrainingBatches
from retemper.pipeline.distributed.environment import in_force
from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.gpus import peak_flops
from retemper.pipeline.evals.hook import Scores, format_scores
from retemper.pipeline.files.jsonl import append_line
from retemper.pipeline.model.graph import is_recorded
from retemper.pipeline.model.kernels import detect_kernels
from retemper.pipeline.runs import run_folder
from retemper.pipeline.runs.track import TrainingTracker
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.step import StepResult


class Log:
    """A context manager that reports the progress of a run; does nothing unless enabled.

    It reads `state` and `batches`, which the training loop advances.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        batches: TrainingBatches,
        counts: tuple[int, int],
        *,
        enabled: bool,
    ):
        """Write config.json, start the tracker and print the first lines.

        Args:
            config: of the run.
            state: of the run, updated by the loop.
            batches: the data of the run, advanced by the loop.
            counts: the numbers of trainable and of frozen parameters.
            enabled: on rank 0 only.
        """
        self.config = config
        self.state = state
        self.batches = batches
        self.enabled = enabled
        if not enabled:
            return
        run_folder.start_or_resume(config, state.step)
        self.tracker = TrainingTracker(config)
        label = f"{config.study}/{config.name}"
        print(
            f"{label}: method={config.method.name}, {counts[0]:,} trainable and "
            f"{counts[1]:,} frozen parameters, from step {state.step}",
            flush=True,
        )
        samples = (
            state.samples_of_data + (config.steps - state.step) * config.train.global_batch_size
        )
        epochs = ", ".join(
            f"{number:.3g} epochs of {name}"
            for name, number in batches.streams.epochs(samples).items()
        )
        print(
            f"{label}: {config.steps:,} steps of {config.tokens_per_step:,} tokens, {epochs}",
            flush=True,
        )
        graph = "; micro-batches replayed from a CUDA graph" if is_recorded(config) else ""
        print(f"{label}: kernels: {detect_kernels()}{graph}", flush=True)
        if variables := str(in_force()):
            print(f"{label}: environment: {variables}", flush=True)
        if state.data_changes and state.data_changes[-1]["step"] == state.step:
            print(
                "\n".join(
                    [f"{label}: the data changes here:", *state.data_changes[-1]["difference"]]
                ),
                flush=True,
            )
        if state.step >= config.steps:
            print(
                f"{label}: complete, {config.steps} steps; `retemper eval run {config.run_dir}` "
                "evaluates the checkpoints that have no scores yet",
                flush=True,
            )
        # disable=None: show the bar on a terminal only.
        self.bar = tqdm(
            total=config.steps,
            initial=state.step,
            desc=label,
            unit="step",
            dynamic_ncols=True,
            disable=None,
        )
        self.mark = state.step, state.seconds, batches.seconds_waited
        self.checkpoint_seconds = 0.0
        self.warned = False  # about steps without a loss

    def step(self, result: StepResult | None) -> None:
        """Count one step, and report it where a report is due.

        result: None where the batch of the step was skipped.
        """
        if not self.enabled:
            return
        self.bar.update()
        if not result:
            self.bar.write(f"step {self.state.step:>6}  skipped ({run_folder.SKIPPED_BATCHES})")
            return
        if result.loss is None and not self.warned:
            self._warn_of_no_loss()
        if not self.config.logs_after(self.state.step):
            return
        now = self.state.step, self.state.seconds, self.batches.seconds_waited
        steps, seconds, waited = (
            after - before for after, before in zip(now, self.mark, strict=True)
        )
        self.mark = now
        tokens_per_second = steps * self.config.tokens_per_step / seconds
        record = {
            "step": self.state.step,
            "tokens": self.state.consumed_samples * self.config.data.seq_length,
            **({} if result.loss is None else {"loss": result.loss}),
            **{f"loss/{name}": loss for name, loss in result.stream_losses.items()},
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": tokens_per_second,
            "data_wait_fraction": waited / seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "peak_memory_bytes": _peak_memory(),
        }
        self.checkpoint_seconds = 0.0
        record |= _utilisation(self.config, tokens_per_second) | result.norms
        record |= {
            f"epochs/{name}": epochs
            for name, epochs in self.batches.streams.epochs(self.state.samples_of_data).items()
        }
        append_line(self.config.run_dir / run_folder.METRICS, record)
        self.tracker.log(record)
        loss = "-" if result.loss is None else f"{result.loss:.4f}"
        self.bar.write(
            f"step {record['step']:>6}  loss {loss}  grad_norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {tokens_per_second:,.0f} tokens/s"
        )

    def _warn_of_no_loss(self) -> None:
        self.warned = True
        self.bar.write(
            f"warning: step {self.state.step} has no labelled token: all of its batch is prompt, "
            "padding, or skipped with a bad shard. It has no loss; further such steps are not "
            "reported. "
            f"`retemper data show {self.config.run_dir} --step {self.state.step}` "
            "shows the samples"
        )

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure for the next record how long a save blocks the loop."""
        started = time.perf_counter()
        yield
        if self.enabled:
            self.checkpoint_seconds += time.perf_counter() - started

    def scores(self, scores: Scores | None) -> None:
        """Report the scores of this step; None where it was not scored now."""
        if not self.enabled or not scores:
            return
        self.tracker.scores()
        self.bar.write(format_scores(self.state.step, scores))

    def stopped(self) -> None:
        """Report that a signal ended the run, and where it will continue."""
        if self.enabled:
            self.bar.write(
                f"stopped by a signal; saved after step {self.state.step}, "
                "the same command continues from there"
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_error) -> None:
        if self.enabled:
            self.bar.close()
            self.tracker.close()


def _utilisation(config: Config, tokens_per_second: float) -> dict[str, float]:
    """Return tokens per second and GPU, model FLOP/s of all ranks, and mfu if the GPU is known."""
    ranks = config.parallel.world_size
    model_flops = tokens_per_second * flops_per_token(
        config.model, config.method.lora, config.data.seq_length
    )
    peak = peak_flops(
        torch.cuda.get_device_name() if torch.cuda.is_available() else None, config.precision
    )
    figures = {
        "tokens_per_second_per_gpu": tokens_per_second / ranks,
        "model_flops_per_second": model_flops,
    }
    return figures | ({"mfu": model_flops / (ranks * peak)} if peak else {})


def _peak_memory() -> int | None:
    """Return this rank's peak memory in bytes.

    On a GPU it is that of its tensors; elsewhere that of the process, or None if /proc lacks it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(peak[1]) << 10 if peak else None
