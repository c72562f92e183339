"""What the steps of a run were scored, and how far each is from the model that the run began from."""

from collections.abc import Iterator

from retemper.pipeline import eval_folder
from retemper.pipeline.eval_folder import samples_path, scored_steps
from retemper.pipeline.evals.score_code import problem_scores as scores_of_programs
from retemper.pipeline.evals.score_code import verdicts_path
from retemper.pipeline.evals.uncertainty import paired_difference, scores_by_problem
from retemper.pipeline.evals.worker import generations_path
from retemper.pipeline.records import read_records
from retemper.pipeline.schema import Config


def table(config: Config) -> Iterator[str]:
    """A line for each task of each step. The difference is of the same problems, with its standard error and 95% interval."""
    base = eval_folder.read_tasks(config.run_dir, 0)
    yield f"{'step':>8}  {'task':<16}{'metric':<26}{'score':>8}  {'95% interval':<18}{'from step 0':<30}"
    for step in scored_steps(config.run_dir):
        for task, scores in eval_folder.read_tasks(config.run_dir, step).items():
            low, high = scores["interval"]
            line = f"{step:>8}  {task:<16}{scores['metric']:<26}{scores['score']:>8.4f}  {f'{low:.4f} to {high:.4f}':<18}"
            difference = _difference(config, step, task, base[task], scores) if step and task in base else ""
            yield f"{line}{difference:<34}{_not_known_clean(scores['decontaminated'])}".rstrip()


def _not_known_clean(decontaminated: dict[str, bool | None]) -> str:
    """Which training streams may hold the task's problems."""
    streams = [name for name, clean in decontaminated.items() if not clean]
    return f"not decontaminated: {', '.join(streams)}" if streams else ""


def _difference(config: Config, step: int, task: str, base: dict, scores: dict) -> str:
    if base["metric"] != scores["metric"] or base["settings"] != scores["settings"]:
        return "scored with other settings"
    difference = paired_difference(*(_by_problem(config, at, task, scores["metric"]) for at in (0, step)))
    return f"{difference.value:+.4f} ± {difference.stderr:.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _by_problem(config: Config, step: int, task: str, metric: str) -> dict:
    verdicts = verdicts_path(generations_path(config, step, task))
    if verdicts.exists():
        return scores_of_programs(verdicts)
    return scores_by_problem(read_records(samples_path(config.run_dir, step, task), {"doc_id": int, "filter": str}), metric)
