"""The inline hook: scores of a step, computed once and written to evals/<step>/."""

import json

from retemper.pipeline import run_folder
from retemper.pipeline.config import Config
from retemper.pipeline.distributed.topology import Topology, from_rank_zero
from retemper.pipeline.evals.heldout import heldout_scores


def evaluate(config: Config, topology: Topology, model, step: int) -> dict | None:
    """Score the model as it stands after `step` steps. None where that step has its scores already. Every rank calls it."""
    path = run_folder.scores_path(config.run_dir, step)
    if not config.evals.heldout or from_rank_zero(path.exists()):
        return None
    scores = heldout_scores(config, topology, model)
    if topology.rank == 0:
        run_folder.replace_file(path, json.dumps(scores, indent=2))
    return scores


def format_scores(step: int, scores: dict) -> str:
    """One line for the terminal."""
    return f"step {step:>6}  held-out " + "  ".join(
        f"{domain} {values['bits_per_byte']:.4f} bits/byte" for domain, values in scores.items()
    )
