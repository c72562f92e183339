"""Two scored models beside each other: differences over the samples and problems they share."""

import math
from dataclasses import dataclass

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.score_code import problem_scores as scores_of_programs
from retemper.pipeline.evals.score_code import verdicts_path
from retemper.pipeline.evals.uncertainty import (
    Estimate,
    mean,
    paired_difference,
    ratio,
    scores_by_problem,
)
from retemper.pipeline.files.records import read_records
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class Scored:
    """A model with scores: that of a run after a step."""

    config: Config
    step: int

    @property
    def start(self) -> "Scored":
        """What its run began with."""
        return Scored(self.config, 0)


def heldout_difference(first: Scored, second: Scored, domain: str) -> Estimate:
    """Of bits per byte, second minus first. Raises UserError where they have other samples."""
    return _contrast([(1, second), (-1, first)], domain)


def gain_difference(first: Scored, second: Scored, domain: str) -> Estimate:
    """Of the bits per byte gained since each one's start, second minus first. Raises UserError."""
    gains = [(1, second.start), (-1, second), (-1, first.start), (1, first)]
    return _contrast(gains, domain)


def _contrast(signed: list[tuple[int, Scored]], domain: str) -> Estimate:
    """A signed sum of models' bits per byte, sample by sample."""
    scored = [(sign, _samples(each, domain)) for sign, each in signed]
    sizes = [_sizes(samples) for _, samples in scored]
    if any(other != sizes[0] for other in sizes):
        raise UserError("scored on other samples")
    # Summed exactly: equal models differ by nothing, and not by what rounding leaves.
    bits = [math.fsum(sign * each[key]["bits"] for sign, each in scored) for key in sizes[0]]
    return ratio(bits, list(sizes[0].values()))


def task_difference(first: Scored, second: Scored, task: str) -> Estimate:
    """Of a task's score, second minus first. Raises UserError where they do not compare."""
    scores = [_scores(each, task) for each in (first, second)]
    if any(scores[0][key] != scores[1][key] for key in ("metric", "settings")):
        raise UserError("scored with other settings")
    metric = scores[0]["metric"]
    return paired_difference(*(_problems(each, task, metric) for each in (first, second)))


def forgetting(tasks: dict[str, dict]) -> Estimate | None:
    """The forgetting score of a step's tasks with its interval; None where a task is missing."""
    if eval_folder.forgetting(tasks) is None:
        return None
    return mean([_estimate(tasks[name]) for name in eval_folder.FORGOTTEN])


def forgetting_difference(first: Scored, second: Scored) -> Estimate:
    """Of the forgetting score, second minus first, over the problems of its tasks.

    Raises UserError where they do not compare.
    """
    return mean([task_difference(first, second, name) for name in eval_folder.FORGOTTEN])


def _estimate(scores: dict) -> Estimate:
    return Estimate(scores["score"], scores["stderr"], *scores["interval"], scores["samples"])


def _scores(scored: Scored, task: str) -> dict:
    return eval_folder.tasks_of(scored.config, scored.step)[task]


def _samples(scored: Scored, domain: str) -> dict[int, dict]:
    """Sample -> its bits and bytes."""
    name = eval_folder.heldout_name(domain)
    homes = eval_folder.homes(scored.config, scored.step)
    paths = [eval_folder.samples_path(home, scored.step, name) for home in homes]
    path = next((path for path in paths if path.is_file()), paths[0])
    records = read_records(path, {"sample": int, "bits": float, "bytes": float})
    return {record["sample"]: record for record in records}


def _sizes(samples: dict[int, dict]) -> dict[int, float]:
    return {sample: record["bytes"] for sample, record in sorted(samples.items())}


def _problems(scored: Scored, task: str, metric: str) -> dict:
    """Problem -> its score."""
    homes = eval_folder.homes(scored.config, scored.step)
    held = (home for home in homes if task in eval_folder.read_tasks(home, scored.step))
    home = next(held, homes[0])
    verdicts = verdicts_path(eval_folder.generations_path(home, scored.step, task))
    if verdicts.exists():
        return scores_of_programs(verdicts)
    path = eval_folder.samples_path(home, scored.step, task)
    return scores_by_problem(read_records(path, {"doc_id": int, "filter": str}), metric)
