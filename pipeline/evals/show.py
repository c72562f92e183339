"""What the steps of a run were scored, and how far each is from the model that the run began from."""

from collections.abc import Iterator

from retemper.pipeline import eval_folder
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.score_code import problem_scores as scores_of_programs
from retemper.pipeline.evals.score_code import verdicts_path
from retemper.pipeline.evals.uncertainty import Estimate, paired_difference, ratio, scores_by_problem
from retemper.pipeline.evals.worker import generations_path
from retemper.pipeline.records import read_records
from retemper.pipeline.schema.run import Config


def table(config: Config) -> Iterator[str]:
    """A line for each domain and task of each step. The difference is of the same problems, with its standard error and 95% interval."""
    steps, heldout = eval_folder.scored_steps(config.run_dir), eval_folder.read_scores(config.run_dir)
    if not steps:
        raise UserError(f"{config.run_dir} has no scores yet: `retemper eval` and `retemper evals worker` make them")
    base = eval_folder.read_tasks(config.run_dir, 0)
    yield f"{'step':>8}  {'task':<16}{'metric':<26}{'n':>6}{'score':>9}  {'95% interval':<18}from step 0"
    for step in steps:
        for domain, scores in heldout.get(step, {}).items():
            difference = _heldout_difference(config, step, domain) if step and domain in heldout.get(0, {}) else ""
            yield _line(step, domain, "bits_per_byte", scores | {"score": scores["bits_per_byte"]}, difference)
        tasks = eval_folder.read_tasks(config.run_dir, step)
        for task, scores in tasks.items():
            difference = _difference(config, step, task, base[task], scores) if step and task in base else ""
            yield _line(step, task, scores["metric"], scores, f"{difference}  {_not_known_clean(scores['decontaminated'])}")
        if (mean := eval_folder.forgetting(tasks)) is not None:
            yield f"{step:>8}  {'forgetting score':<16}{f' mean of {len(eval_folder.FORGOTTEN)}':<26}{'':>6}{mean:>9.4f}"
        for task, error in eval_folder.read_errors(config.run_dir, step).items():
            yield f"{step:>8}  {task:<16}was not scored: {error}"


def _line(step: int, name: str, metric: str, scores: dict, difference: str) -> str:
    interval = "{:.4f} to {:.4f}".format(*scores["interval"])
    return f"{step:>8}  {name:<16}{metric:<26}{scores['samples']:>6}{scores['score']:>9.4f}  {interval:<18}{difference}".rstrip()


def _not_known_clean(decontaminated: dict[str, bool | None]) -> str:
    """Which training streams may hold the task's problems."""
    streams = [name for name, clean in decontaminated.items() if not clean]
    return f"not decontaminated in {', '.join(streams)}" if streams else ""


def _difference(config: Config, step: int, task: str, base: dict, scores: dict) -> str:
    if base["metric"] != scores["metric"] or base["settings"] != scores["settings"]:
        return "scored with other settings"
    return _said(paired_difference(*(_by_problem(config, at, task, scores["metric"]) for at in (0, step))))


def _heldout_difference(config: Config, step: int, domain: str) -> str:
    first, second = (_by_sample(config, at, domain) for at in (0, step))
    if {sample: record["bytes"] for sample, record in first.items()} != {sample: record["bytes"] for sample, record in second.items()}:
        return "scored on other samples"
    bits = [second[sample]["bits"] - record["bits"] for sample, record in first.items()]
    return _said(ratio(bits, [record["bytes"] for record in first.values()]))


def _said(difference: Estimate) -> str:
    if difference.stderr == 0:
        return f"{difference.value:+.4f} on each of {difference.problems}"  # which is no certainty of others
    return f"{difference.value:+.4f} ± {difference.stderr:.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _by_sample(config: Config, step: int, domain: str) -> dict[int, dict]:
    path = eval_folder.samples_path(config.run_dir, step, eval_folder.heldout_name(domain))
    return {record["sample"]: record for record in read_records(path, {"sample": int, "bits": float, "bytes": float})}


def _by_problem(config: Config, step: int, task: str, metric: str) -> dict:
    verdicts = verdicts_path(generations_path(config, step, task))
    if verdicts.exists():
        return scores_of_programs(verdicts)
    return scores_by_problem(read_records(eval_folder.samples_path(config.run_dir, step, task), {"doc_id": int, "filter": str}), metric)
