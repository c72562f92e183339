"""The training loop: next batch, step, log, save, evaluate."""

import time

from tqdm import tqdm

from retemper.pipeline import run_folder
from retemper.pipeline.checkpoint.sharded import Checkpointer
from retemper.pipeline.config import Config
from retemper.pipeline.data.batch import TrainingBatches
from retemper.pipeline.distributed.seeds import seed_step
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.hook import evaluate
from retemper.pipeline.model.build import build_model, parameter_counts
from retemper.pipeline.track import Tracker
from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
from retemper.pipeline.train.state import TrainState
from retemper.pipeline.train.step import StepResult, train_step


def train(config: Config, topology: Topology, fingerprints: dict[str, str]) -> TrainState:
    """Train until config.steps, from the newest checkpoint where there is one. Every rank calls it.

    fingerprints: of the data and the base, kept in every checkpoint and checked on resume.
    """
    model = build_model(config, topology)
    optimizer = build_optimizer(config, model)
    schedule = build_schedule(config, optimizer)
    checkpointer = Checkpointer(config, topology, model, optimizer, fingerprints)
    state = checkpointer.restore()
    schedule.step(state.consumed_samples * config.data.seq_length)
    batches = TrainingBatches(config, topology)
    log = _Log(config, state, parameter_counts(model)) if topology.rank == 0 else None

    def measure():
        scores = evaluate(config, topology, model, state.step)
        if log and scores:
            log.scores(scores)

    seed_step(config.train.seed, state.step, topology)
    if state.step in (0, *config.milestone_steps):
        measure()  # the start of the run, or a milestone whose evaluation was cut short
    while state.step < config.steps:
        started = time.perf_counter()
        seed_step(config.train.seed, state.step, topology)
        result = train_step(config, model, optimizer, schedule, batches.of_step(state.consumed_samples))
        state.step += 1
        state.consumed_samples += config.train.global_batch_size
        state.seconds += time.perf_counter() - started
        if log:
            log.step(result)
        if _saves_after(config, state.step):
            checkpointer.save(state)
        if state.step in config.milestone_steps:
            measure()
    if log:
        log.close()
    return state


def _saves_after(config: Config, step: int) -> bool:
    every = config.checkpoint.save_every_steps
    return step in config.milestone_steps or (every > 0 and step % every == 0)


class _Log:
    """What rank 0 shows and records: a progress bar, one line per logged step, metrics.jsonl, W&B."""

    def __init__(self, config: Config, state: TrainState, counts: tuple[int, int]):
        self.config, self.state = config, state
        run_folder.claim(config, state.step)
        self.tracker = Tracker(config)
        label = f"{config.study}/{config.name}"
        print(f"{label}: method={config.method.name}, {counts[0]:,} trainable and {counts[1]:,} frozen parameters on this rank", flush=True)
        self.bar = tqdm(total=config.steps, initial=state.step, desc=label, unit="step", dynamic_ncols=True, disable=None)  # on a terminal only
        self.mark = state.step, state.seconds

    def step(self, result: StepResult) -> None:
        self.bar.update()
        if self.state.step % self.config.train.log_every_steps and self.state.step != self.config.steps:
            return
        steps, seconds = self.state.step - self.mark[0], self.state.seconds - self.mark[1]
        self.mark = self.state.step, self.state.seconds
        record = {
            "step": self.state.step,
            "tokens": self.state.consumed_samples * self.config.data.seq_length,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": steps * self.config.tokens_per_step / seconds,
        }
        self._record(record)
        self.bar.write(
            f"step {record['step']:>6}  loss {record['loss']:.4f}  grad_norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        )

    def scores(self, scores: dict) -> None:
        self.tracker.log({"step": self.state.step, **{f"heldout/{d}/bits_per_byte": s["bits_per_byte"] for d, s in scores.items()}})
        self.bar.write(f"step {self.state.step:>6}  held-out " + "  ".join(f"{d} {s['bits_per_byte']:.4f} bits/byte" for d, s in scores.items()))

    def close(self) -> None:
        self.bar.close()
        self.tracker.close()

    def _record(self, record: dict) -> None:
        run_folder.append_metrics(self.config.run_dir, record)
        self.tracker.log(record)
