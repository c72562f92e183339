"""One rank of `retemper eval`: scores every committed checkpoint that has no scores yet.

`torchrun --nproc-per-node 2 -m retemper.pipeline.evals RUN evals.…=… parallel.…=…`
"""

import sys
from functools import partial
from pathlib import Path

from retemper.pipeline.config.existing_run import SCORING_OVERRIDES, load_run
from retemper.pipeline.distributed.exit import exit_now
from retemper.pipeline.entry.rank import run_rank
from retemper.pipeline.errors import UserError


def main(run_dir: str = "", *overrides: str) -> int:
    """Score a run's checkpoints as one rank, and return the exit code."""
    return run_rank(
        partial(load_run, Path(run_dir), list(overrides), SCORING_OVERRIDES), score_checkpoints
    )


def score_checkpoints(config, topology, fingerprints) -> None:
    """Score the initial model and each committed checkpoint that lacks scores, in step order.

    Args:
        config: The run's config, in the layout that is to score it.
        topology: This rank's position in that layout.
        fingerprints: Hashes of the inputs, as the preflight check returns them.

    Raises:
        UserError: Some tasks could not be scored; raised after everything else was.

    Collective: every rank must call this.
    """
    from retemper.pipeline.checkpoint import commit
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.distributed.collectives import broadcast_from_rank0
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.evals.hook import evaluate, format_scores, unscored
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.runs import eval_folder
    from retemper.pipeline.runs.track import mirror_scores

    eval_folder.check_settings(config, config.evals.inline_tasks)
    start = broadcast_from_rank0(eval_folder.start_of(config))
    runs = {
        step: config if step else start
        for step in _steps(start, commit.committed_steps(config.run_dir))
    }
    runs = broadcast_from_rank0(
        {step: run for step, run in runs.items() if any(unscored(run, step))}
    )
    if start is None and topology.rank == 0:
        print(
            f"{config.run_dir}: the trunk {config.branch_of} was not found, "
            "so step 0 cannot be scored"
        )
    # Step 0 of a branch is the trunk's initial model: drawn from the trunk's seed, or its base.
    initial = runs.get(0, config)
    model = build_model(initial, topology)
    if runs.keys() & {0} or config.method.name == "lora":
        Checkpointer(initial, topology, model, None, fingerprints).begin()
    checkpointer = Checkpointer(config, topology, model, None, fingerprints)
    seed_step(config.seed, 0, topology)
    failed = []
    for step, run in runs.items():
        if step:
            checkpointer.load(step)
        scores = evaluate(run, topology, model, step)
        if topology.rank == 0 and scores:  # None where another process has scored it meanwhile
            print(format_scores(step, scores), flush=True)
            failed += [
                f"step {step}: {task}" for task, result in scores.tasks.items() if "error" in result
            ]
    if topology.rank == 0:
        if not runs:
            print(f"{config.run_dir}: all checkpoints already have scores")
        for run in {run.run_dir: run for run in (config, *runs.values())}.values():
            mirror_scores(run)
    if failed := broadcast_from_rank0(failed):
        raise UserError(f"not scored (the reasons are printed above): {'; '.join(failed)}")


def _steps(start, committed: list[int]) -> list[int]:
    """Return the steps to score. Step 0 of a branch is scored once, in its trunk's folder."""
    return [0, *committed] if start and committed else committed


if __name__ == "__main__":
    exit_now(main(*sys.argv[1:]))
