"""The inline hook: scores of a step, computed once and written to evals/<step>/."""

import json

from retemper.pipeline import run_folder
from retemper.pipeline.distributed.topology import Topology, from_rank_zero
from retemper.pipeline.evals.heldout import heldout_scores
from retemper.pipeline.schema import Config


def evaluate(config: Config, topology: Topology, model, step: int) -> dict | None:
    """Score the model as it stands after `step` steps on the domains that this step has no score of. Every rank calls it.

    Returns the new scores; None where there was nothing to score.
    """
    known = from_rank_zero(run_folder.read_scores(config.run_dir).get(step, {}))
    missing = [domain for domain in config.evals.heldout if domain not in known]
    if not missing:
        return None
    scores = heldout_scores(config, topology, model, missing)
    if topology.rank == 0:
        run_folder.replace_file(run_folder.scores_path(config.run_dir, step), json.dumps(known | scores, indent=2))
    return scores


def format_scores(step: int, scores: dict) -> str:
    """One line for the terminal."""
    return f"step {step:>6}  held-out " + "  ".join(
        f"{domain} {values['bits_per_byte']:.4f} bits/byte" for domain, values in scores.items()
    )
