"""The training loop: next batch, step, log, save, evaluate."""

import time
from typing import Any

from retemper.pipeline.checkpoint.sharded import Checkpointer
from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.data.ledger import Ledger
from retemper.pipeline.data.reader import TrainingBatches
from retemper.pipeline.distributed.seeds import seed_step
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.hook import evaluate
from retemper.pipeline.model.build import build_model, parameter_counts
from retemper.pipeline.schema import Config
from retemper.pipeline.train.log import Log
from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
from retemper.pipeline.train.step import train_step


def train(config: Config, topology: Topology, fingerprints: dict[str, Any]) -> TrainState:
    """Train until config.steps, from the newest checkpoint where there is one. Every rank calls it.

    fingerprints: of the data and the base, kept in every checkpoint and checked on resume.
    """
    model = build_model(config, topology)
    optimizer = build_optimizer(config, model)
    schedule = build_schedule(config, optimizer)
    checkpointer = Checkpointer(config, topology, model, optimizer, fingerprints)
    state = checkpointer.restore()
    schedule.step(state.consumed_samples * config.data.seq_length)
    ledger = Ledger(config, topology)
    with TrainingBatches(config, topology, state.samples_of_data, config.steps - state.step) as batches:
        counts = parameter_counts(model, config.parallel.tensor_parallel_size)
        log = Log(config, state, batches, counts, enabled=topology.rank == 0)
        seed_step(config.seed, state.step, topology)
        if state.step in (0, *config.milestone_steps):  # the start of the run, or a milestone whose evaluation was cut short
            log.scores(evaluate(config, topology, model, state.step))
        while state.step < config.steps:
            started = time.perf_counter()
            seed_step(config.seed, state.step, topology)
            data = next(batches)
            result = train_step(config, model, optimizer, schedule, data.micro_batches)
            state.step += 1
            state.consumed_samples += config.train.global_batch_size
            state.seconds += time.perf_counter() - started
            ledger.record(state.step, data)
            log.step(result)
            if _saves_after(config, state.step):
                with log.saving():
                    checkpointer.save(state)
            if state.step in config.milestone_steps:
                log.scores(evaluate(config, topology, model, state.step))
        log.close()
    return state


def _saves_after(config: Config, step: int) -> bool:
    every = config.checkpoint.save_every_steps
    return step in config.milestone_steps or (every > 0 and step % every == 0)
