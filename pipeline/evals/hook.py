"""The inline evaluation hook: score the live model at a step, once."""

import time
from dataclasses import dataclass

from retemper.pipeline.compat.light_imports import import_transformers
from retemper.pipeline.distributed.collectives import broadcast_from_rank0
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.evals.heldout import heldout_scores
from retemper.pipeline.evals.paired import forgetting
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class Scores:
    """The new scores of a step."""

    heldout: dict[str, dict]  # domain -> scores
    heldout_seconds: float
    tasks: dict[str, dict]  # task -> the content of its file; on rank 0 only
    forgetting: Estimate | None = None


def evaluate(config: Config, topology: Topology, model, step: int) -> Scores | None:
    """Score the model on the held-out domains and inline tasks that have no score at a step.

    Args:
        config: The run's config.
        topology: This rank's position in the layout.
        model: The live model, after `step` steps.
        step: The step that the scores are stored under.

    Returns:
        The new scores, or None if nothing was left to score. A task that failed has
        {"error": …} in place of its scores.

    Collective: every rank must call this.
    """
    missing, tasks = broadcast_from_rank0(unscored(config, step))
    if not (missing or tasks):
        return None
    started = time.perf_counter()
    heldout = heldout_scores(config, topology, model, missing) if missing else {}
    seconds = time.perf_counter() - started
    scores = {domain: result.scores for domain, result in heldout.items()}
    if missing and topology.rank == 0:
        eval_folder.write_heldout(
            config.run_dir,
            step,
            scores,
            {domain: result.samples for domain, result in heldout.items()},
        )
    scored = _score(config, topology, model, step, tasks) if tasks else {}
    return Scores(
        scores,
        seconds,
        scored,
        forgetting(eval_folder.read_tasks(config.run_dir, step)) if scored else None,
    )


def unscored(config: Config, step: int) -> tuple[list[str], list[str]]:
    """Return the held-out domains and the inline tasks without scores at a step."""
    domains = eval_folder.read_scores(config.run_dir).get(step, {})
    tasks = eval_folder.read_tasks(config.run_dir, step) if config.evals.inline_tasks else {}
    return [name for name in config.evals.heldout if name not in domains], [
        name for name in config.evals.inline_tasks if name not in tasks
    ]


def _score(
    config: Config, topology: Topology, model, step: int, names: list[str]
) -> dict[str, dict]:
    from retemper.pipeline.evals.team import RankZeroServer

    team = RankZeroServer(config, topology, model)
    if topology.rank != 0:
        team.serve()
        return {}
    import_transformers()
    from retemper.pipeline.evals.inline import score_tasks

    scored = {}
    for name, scores, problems in score_tasks(config, team, names):
        eval_folder.write_result(config.run_dir, step, name, scores, problems)
        scored[name] = scores
    team.shutdown()
    return scored


def format_scores(step: int, scores: Scores) -> str:
    """Format a step's new scores as lines for the terminal."""
    lines = []
    if scores.heldout:
        lines.append(
            "held-out "
            + "  ".join(
                f"{domain} {values['bits_per_byte']:.4f} ± {values['stderr']:.4f} bits/byte"
                for domain, values in scores.heldout.items()
            )
            + f"  ({scores.heldout_seconds:.2f} s)"
        )
    for name, values in scores.tasks.items():
        lines.append(
            f"{name} "
            + (
                f"was not scored: {values['error']}"
                if "error" in values
                else _format_metrics(values)
            )
        )
    if scores.forgetting is not None:
        score = f"{scores.forgetting.value:.4f} ± {scores.forgetting.stderr:.4f}"
        lines.append(
            f"forgetting score {score} (mean of {', '.join(eval_folder.FORGETTING_TASKS)})"
        )
    return "\n".join(f"step {step:>6}  {line}" for line in lines)


def _format_metrics(scores: dict) -> str:
    figures = [
        f"{metric} {values['value']:.4f}"
        + ("" if values["stderr"] is None else f" ± {values['stderr']:.4f}")
        for metric, values in scores["metrics"].items()
    ]
    cut = (
        f", {scores['cut_prompts']} of them cut to the model's maximum length"
        if scores["cut_prompts"]
        else ""
    )
    return f"{'  '.join(figures)}  ({scores['samples']} problems{cut}, {scores['seconds']:.0f} s)"
