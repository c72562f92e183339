"""One rank of `retemper eval`: scores for every committed checkpoint of a run that has none yet.

`torchrun --nproc-per-node 2 -m retemper.pipeline.evals RUN evals.…=… parallel.…=…`
"""

import sys
from functools import partial
from pathlib import Path

from retemper.pipeline.config.existing_run import OF_SCORING, load_run
from retemper.pipeline.entry.rank import leave, run_rank
from retemper.pipeline.errors import UserError


def main(run_dir: str = "", *overrides: str) -> int:
    return run_rank(
        partial(load_run, Path(run_dir), list(overrides), OF_SCORING), score_checkpoints
    )


def score_checkpoints(config, topology, fingerprints) -> None:
    """Load what the run begins with and each checkpoint in turn, and run the hook on it."""
    from retemper.pipeline.checkpoint import commit
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.distributed.collectives import from_rank_zero
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.evals.hook import evaluate, format_scores, unscored
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.runs import eval_folder
    from retemper.pipeline.runs.track import mirror_scores

    eval_folder.check_settings(config, config.evals.inline)
    start = from_rank_zero(eval_folder.start_of(config))
    runs = {
        step: config if step else start
        for step in _steps(start, commit.committed_steps(config.run_dir))
    }
    runs = from_rank_zero({step: run for step, run in runs.items() if any(unscored(run, step))})
    if start is None and topology.rank == 0:
        print(
            f"{config.run_dir}: its trunk {config.branch_of} is gone, so that its start cannot be scored"
        )
    # A trunk's own weights, where they are drawn, and its own base.
    begun = runs.get(0, config)
    model = build_model(begun, topology)
    if runs.keys() & {0} or config.method.name == "lora":
        Checkpointer(begun, topology, model, None, fingerprints).begin()
    checkpointer = Checkpointer(config, topology, model, None, fingerprints)
    seed_step(config.seed, 0, topology)
    failed = []
    for step, run in runs.items():
        if step:
            checkpointer.load(step)
        scores = evaluate(run, topology, model, step)
        if topology.rank == 0:
            print(format_scores(step, scores), flush=True)
            failed += [
                f"step {step}: {task}" for task, found in scores.tasks.items() if "error" in found
            ]
    if topology.rank == 0:
        if not runs:
            print(f"{config.run_dir}: every checkpoint has its scores already")
        for run in {run.run_dir: run for run in (config, *runs.values())}.values():
            mirror_scores(run)
    if failed := from_rank_zero(failed):
        raise UserError(f"not scored, for the reasons above: {'; '.join(failed)}")


def _steps(start, committed: list[int]) -> list[int]:
    """Of the run: step 0 of a branch is its trunk's, in whose folder it is scored once."""
    return [0, *committed] if start and committed else committed


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
