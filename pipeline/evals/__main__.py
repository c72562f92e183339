"""One rank of `retemper eval`: scores for every committed checkpoint of a run that has none yet."""

import sys

from retemper.pipeline.ranks import leave, run_rank


def main(overrides: list[str]) -> int:
    return run_rank(overrides, score_checkpoints)


def score_checkpoints(config, topology, fingerprints) -> None:
    """Load each checkpoint in turn and run the hook on it."""
    from retemper.pipeline.checkpoint import commit
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.distributed.topology import from_rank_zero
    from retemper.pipeline.evals.hook import evaluate, format_scores
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.track import mirror_scores

    model = build_model(config, topology)
    checkpointer = Checkpointer(config, topology, model, None, fingerprints)
    checkpointer.restore()
    seed_step(config.seed, 0, topology)
    scored = False
    for step in from_rank_zero(commit.committed_steps(config.run_dir)):
        checkpointer.load(step)
        scores = evaluate(config, topology, model, step)
        if scores and topology.rank == 0:
            print(format_scores(step, scores), flush=True)
            scored = True
    if topology.rank != 0:
        return
    if not scored:
        print(f"{config.run_dir}: every checkpoint has its scores already")
    mirror_scores(config)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
