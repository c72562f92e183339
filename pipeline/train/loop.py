"""The training loop: next batch, step, log, save, evaluate."""

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

from retemper.pipeline.checkpoint import base
from retemper.pipeline.checkpoint.sharded import Checkpointer
from retemper.pipeline.data.ledger import Ledger
from retemper.pipeline.data.reader import TrainingBatches
from retemper.pipeline.distributed.seeds import seed_step
from retemper.pipeline.distributed.signals import stop_requested
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.hook import evaluate
from retemper.pipeline.files.lock import only_one
from retemper.pipeline.model.build import build_model, parameter_counts
from retemper.pipeline.model.graph import Passes
from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.anomaly import Anomaly, Unlabelled, roll_back, skipped_steps
from retemper.pipeline.train.log import Log
from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
from retemper.pipeline.train.profile import profiler
from retemper.pipeline.train.step import train_step


def train(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> None:
    """Train until config.steps, from the newest checkpoint where there is one.

    Args:
        config: of the run.
        topology: of this rank.
        fingerprints: of the data and the base, stored in every checkpoint and checked on resume.

    Raises:
        UserError: another process trains this run.

    Collective: every rank must call this.
    """
    refusal = (
        f"{config.run_dir} is being trained by {{process}}: wait for it or stop it, "
        "or set another name"
    )
    lock = config.run_dir / ".lock"
    with only_one(lock, refusal) if topology.rank == 0 else contextlib.nullcontext():
        while anomaly := train_until_anomaly(config, topology, fingerprints):
            roll_back(config, topology, anomaly)


def train_until_anomaly(
    config: Config, topology: Topology, fingerprints: dict[str, Any]
) -> Anomaly | None:
    """Train until the end, a stop signal or an anomalous step.

    Args:
        config: of the run.
        topology: of this rank.
        fingerprints: see `train`.

    Returns:
        The anomaly, or None where the run ended or was stopped.

    Collective: every rank must call this.
    """
    model = build_model(config, topology)
    optimizer = build_optimizer(config, model)
    schedule = build_schedule(config, optimizer)
    checkpointer = Checkpointer(config, topology, model, optimizer, fingerprints)
    state = checkpointer.restore()
    schedule.step(state.consumed_samples * config.data.seq_length)
    ledger = Ledger(config, topology)
    skipped = skipped_steps(config)
    saved_steps = config.saved_steps
    counts = parameter_counts(model, config.parallel.tensor_parallel_size)
    with (
        TrainingBatches(
            config, topology, state.samples_of_data, config.steps - state.step
        ) as batches,
        profiler(config, topology, state.step) as profiled,
        Log(config, state, batches, counts, enabled=topology.rank == 0) as log,
        Passes(config, model) as passes,
    ):
        if topology.rank == 0:
            base.record(config, fingerprints.get("base"))
        unlabelled = Unlabelled(config, batches.streams.epochs, state.samples_of_data)
        seed_step(config.seed, state.step, topology)
        # The start of the run, or a milestone whose evaluation was interrupted.
        if state.step in (0, *config.milestone_steps):
            log.scores(evaluate(config, topology, model, state.step))
        while state.step < config.steps:
            started = time.perf_counter()
            seed_step(config.seed, state.step, topology)
            data = next(batches)
            if state.step + 1 in skipped:
                result = None
                schedule.step(config.tokens_per_step)
            else:
                with garbage_kept():
                    result = train_step(
                        config, state, passes, optimizer, schedule, data.micro_batches
                    )
            if isinstance(result, Anomaly):
                return result
            state.step += 1
            state.consumed_samples += config.train.global_batch_size
            state.seconds += time.perf_counter() - started
            ledger.record(state.step, data)
            log.step(result)
            has_loss = result is not None and result.loss is not None
            unlabelled.check(state.step, state.samples_of_data, has_loss=has_loss)
            profiled()
            stopping = stop_requested()
            if stopping or state.step in saved_steps:
                with log.saving():
                    checkpointer.save(state)
            if stopping:
                log.stopped()
                return None
            if state.step in config.milestone_steps:
                log.scores(evaluate(config, topology, model, state.step))
    return None


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Disable automatic garbage collection, for which the other ranks or the GPU would wait."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
