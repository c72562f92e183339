"""Paired differences of two scored models, over the samples and problems they share."""

import math
from dataclasses import dataclass

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.score_code import problem_scores as code_problem_scores
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
    """A model with scores: the model of a run after a step."""

    config: Config
    step: int

    @property
    def start(self) -> "Scored":
        """The initial model of the same run."""
        return Scored(self.config, 0)


def heldout_difference(first: Scored, second: Scored, domain: str) -> Estimate:
    """Return the paired difference of two models' bits per byte, second minus first.

    Args:
        first: One model.
        second: The other.
        domain: A key of evals.heldout.

    Raises:
        UserError: They were scored on different samples, or the record of samples is missing.
    """
    return _contrast([(1, second), (-1, first)], domain)


def gain_difference(first: Scored, second: Scored, domain: str) -> Estimate:
    """Return the paired difference of two models' gains in bits per byte, second minus first.

    Args:
        first: One model. Its gain is the bits per byte of its run's initial model less its own.
        second: The other.
        domain: A key of evals.heldout.

    Raises:
        UserError: They or their initial models were scored on different samples, or a record of
            samples is missing.
    """
    gains = [(1, second.start), (-1, second), (-1, first.start), (1, first)]
    return _contrast(gains, domain)


def _contrast(signed: list[tuple[int, Scored]], domain: str) -> Estimate:
    """Return a signed sum of models' bits per byte, paired by sample."""
    scored = [(sign, _samples(model, domain)) for sign, model in signed]
    sizes = [_sizes(samples) for _, samples in scored]
    if any(other != sizes[0] for other in sizes):
        raise UserError("scored on other samples")
    # Exact summation, so that the difference of equal models is zero, without rounding errors.
    bits = [math.fsum(sign * samples[key]["bits"] for sign, samples in scored) for key in sizes[0]]
    return ratio(bits, list(sizes[0].values()))


def task_difference(first: Scored, second: Scored, task: str) -> Estimate:
    """Return the paired difference of two models' scores on a task, second minus first.

    Args:
        first: One model.
        second: The other.
        task: A key of evals.tasks.

    Raises:
        UserError: They were scored with another metric, other settings or on other problems, or
            a record of problems is missing.
    """
    scores = [_scores(model, task) for model in (first, second)]
    if any(scores[0][key] != scores[1][key] for key in ("metric", "settings")):
        raise UserError("scored with other settings")
    metric = scores[0]["metric"]
    return paired_difference(*(_problems(model, task, metric) for model in (first, second)))


def forgetting(tasks: dict[str, dict]) -> Estimate | None:
    """Return the forgetting score of a step's tasks with its interval; None if a task is missing.

    Args:
        tasks: Task -> its scores, as evals/<step>/<task>.json holds them.
    """
    if eval_folder.forgetting(tasks) is None:
        return None
    return mean([_estimate(tasks[name]) for name in eval_folder.FORGETTING_TASKS])


def forgetting_difference(first: Scored, second: Scored) -> Estimate:
    """Return the paired difference of two forgetting scores, second minus first.

    It is the mean of the differences of the tasks. Raises UserError as task_difference does.
    """
    return mean([task_difference(first, second, name) for name in eval_folder.FORGETTING_TASKS])


def _estimate(scores: dict) -> Estimate:
    low, high = scores["interval"]
    return Estimate(scores["score"], scores["stderr"], low, high, scores["samples"])


def _scores(scored: Scored, task: str) -> dict:
    return eval_folder.tasks_of(scored.config, scored.step)[task]


def _samples(scored: Scored, domain: str) -> dict[int, dict]:
    """Return sample number -> its bits and bytes."""
    name = eval_folder.heldout_name(domain)
    homes = eval_folder.homes(scored.config, scored.step)
    paths = [eval_folder.samples_path(home, scored.step, name) for home in homes]
    path = next((path for path in paths if path.is_file()), paths[0])
    records = read_records(path, {"sample": int, "bits": float, "bytes": float})
    return {record["sample"]: record for record in records}


def _sizes(samples: dict[int, dict]) -> dict[int, float]:
    return {sample: record["bytes"] for sample, record in sorted(samples.items())}


def _problems(scored: Scored, task: str, metric: str) -> dict:
    """Return problem -> its score."""
    homes = eval_folder.homes(scored.config, scored.step)
    scored_homes = (home for home in homes if task in eval_folder.read_tasks(home, scored.step))
    home = next(scored_homes, homes[0])
    verdicts = verdicts_path(eval_folder.generations_path(home, scored.step, task))
    if verdicts.exists():
        return code_problem_scores(verdicts)
    path = eval_folder.samples_path(home, scored.step, task)
    return scores_by_problem(read_records(path, {"doc_id": int, "filter": str}), metric)
