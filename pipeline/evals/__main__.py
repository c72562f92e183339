"""One rank of `retemper eval`: scores for every committed checkpoint of a run that has none yet.

`torchrun --nproc-per-node 2 -m retemper.pipeline.evals RUN evals.…=… parallel.…=…`
"""

import sys
from functools import partial
from pathlib import Path

from retemper.pipeline.config import OF_SCORING, load_run
from retemper.pipeline.errors import UserError
from retemper.pipeline.ranks import leave, run_rank


def main(run_dir: str = "", *overrides: str) -> int:
    return run_rank(partial(load_run, Path(run_dir), list(overrides), OF_SCORING), score_checkpoints)


def score_checkpoints(config, topology, fingerprints) -> None:
    """Load what the run begins with and each checkpoint in turn, and run the hook on it."""
    from retemper.pipeline import eval_folder
    from retemper.pipeline.checkpoint import commit
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.distributed.topology import from_rank_zero
    from retemper.pipeline.evals.hook import evaluate, format_scores, unscored
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.track import mirror_scores

    eval_folder.check_settings(config.run_dir, {task: config.evals.tasks[task] for task in config.evals.inline})
    steps = from_rank_zero([step for step in _steps(config, commit.committed_steps(config.run_dir)) if any(unscored(config, step))])
    model = build_model(config, topology)
    checkpointer = Checkpointer(config, topology, model, None, fingerprints)
    if 0 in steps or config.method.name == "lora":
        checkpointer.begin()
    seed_step(config.seed, 0, topology)
    failed = []
    for step in steps:
        if step:
            checkpointer.load(step)
        scores = evaluate(config, topology, model, step)
        if topology.rank == 0:
            print(format_scores(step, scores), flush=True)
            failed += [f"step {step}: {task}" for task, found in scores.tasks.items() if "error" in found]
    if topology.rank == 0:
        if not steps:
            print(f"{config.run_dir}: every checkpoint has its scores already")
        mirror_scores(config)
    if failed := from_rank_zero(failed):
        raise UserError(f"not scored, for the reasons above: {'; '.join(failed)}")


def _steps(config, committed: list[int]) -> list[int]:
    """Of the run: a branch begins at a checkpoint of its trunk, which is not its own."""
    return committed if config.branch_of or not committed else [0, *committed]


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
