"""The inline hook: scores of a step, computed once on the live model and written to evals/<step>/."""

import json
import time
from dataclasses import dataclass

from retemper.pipeline import run_folder
from retemper.pipeline.data.corpus import decontaminated
from retemper.pipeline.distributed.topology import Topology, from_rank_zero
from retemper.pipeline.evals.generations import compress_records
from retemper.pipeline.evals.heldout import heldout_scores
from retemper.pipeline.schema import Config

# Whose mean is the forgetting score of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).
FORGOTTEN = ("hellaswag", "arc_challenge", "winogrande")


@dataclass(frozen=True)
class Scores:
    """What a step was newly scored on: heldout by domain; tasks as their files have them, on rank 0 alone."""

    heldout: dict[str, dict]
    heldout_seconds: float
    tasks: dict[str, dict]
    forgetting: float | None = None

    def figures(self) -> dict[str, float]:
        """The numbers to follow, by their names in W&B."""
        figures = {f"heldout/{domain}/bits_per_byte": values["bits_per_byte"] for domain, values in self.heldout.items()}
        for name, scores in self.tasks.items():
            figures |= {f"evals/{name}/{metric}": values["value"] for metric, values in scores.get("metrics", {}).items()}
        return figures if self.forgetting is None else figures | {"evals/forgetting": self.forgetting}


def evaluate(config: Config, topology: Topology, model, step: int) -> Scores | None:
    """Score the model as it stands after `step` steps on the domains and inline tasks that this step has no score of. Every rank calls it.

    Returns the new scores; None where there was nothing to score. A task that cannot be scored has its error in their place.
    """
    known, tasks = from_rank_zero((run_folder.read_scores(config.run_dir).get(step, {}), unscored(config, step)))
    missing = [domain for domain in config.evals.heldout if domain not in known]
    if not (missing or tasks):
        return None
    started = time.perf_counter()
    heldout = heldout_scores(config, topology, model, missing) if missing else {}
    seconds = time.perf_counter() - started
    if missing and topology.rank == 0:
        run_folder.replace_file(run_folder.scores_path(config.run_dir, step), json.dumps(known | heldout, indent=2))
    scored = _score(config, topology, model, step, tasks) if tasks else {}
    return Scores(heldout, seconds, scored, forgetting(run_folder.read_tasks(config.run_dir, step)) if scored else None)


def unscored(config: Config, step: int) -> list[str]:
    """The inline tasks without scores at a step."""
    known = run_folder.read_tasks(config.run_dir, step) if config.evals.inline else {}
    return [name for name in config.evals.inline if name not in known]


def forgetting(tasks: dict[str, dict]) -> float | None:
    """The mean of the scores of FORGOTTEN, where all of them are there."""
    return sum(tasks[name]["score"] for name in FORGOTTEN) / len(FORGOTTEN) if tasks.keys() >= set(FORGOTTEN) else None


def _score(config: Config, topology: Topology, model, step: int, names: list[str]) -> dict[str, dict]:
    from retemper.pipeline.evals.team import Team

    team = Team(config, topology, model)
    if topology.rank != 0:
        team.serve()
        return {}
    from retemper.pipeline.evals.inline import score_tasks

    scored = {}
    for name, scores, problems in score_tasks(config, team, names):
        path = run_folder.task_path(config.run_dir, step, name)
        run_folder.replace_file(path, json.dumps({"step": step, "decontaminated": decontaminated(config, name)} | scores, indent=2))
        if problems:
            run_folder.replace_bytes(path.with_suffix(".samples.jsonl.zst"), compress_records(problems))
        scored[name] = scores
    team.dismiss()
    return scored


def format_scores(step: int, scores: Scores) -> str:
    """Lines for the terminal."""
    lines = []
    if scores.heldout:
        lines.append(
            "held-out "
            + "  ".join(f"{domain} {values['bits_per_byte']:.4f} bits/byte" for domain, values in scores.heldout.items())
            + f"  ({scores.heldout_seconds:.2f} s)"
        )
    for name, values in scores.tasks.items():
        lines.append(f"{name} " + (f"was not scored: {values['error']}" if "error" in values else _format_metrics(values)))
    if scores.forgetting is not None:
        lines.append(f"forgetting score {scores.forgetting:.4f} (mean of {', '.join(FORGOTTEN)})")
    return "\n".join(f"step {step:>6}  {line}" for line in lines)


def _format_metrics(scores: dict) -> str:
    figures = [
        f"{metric} {values['value']:.4f}" + ("" if values["stderr"] is None else f" ± {values['stderr']:.4f}")
        for metric, values in scores["metrics"].items()
    ]
    return f"{'  '.join(figures)}  ({scores['samples']} problems, {scores['seconds']:.0f} s)"
