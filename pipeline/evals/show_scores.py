"""What the steps of a run were scored, and how far each is from the model that the run began from."""

from collections.abc import Callable, Iterator

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.paired import (
    Scored,
    forgetting,
    forgetting_difference,
    heldout_difference,
    task_difference,
)
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.schema.run import Config

COLUMNS = ("step", "task", "metric", "n", "score", "95% interval", "from step 0")


def table(config: Config) -> Iterator[str]:
    """A line for each domain and task of each step."""
    if not (steps := eval_folder.steps_of(config)):
        raise UserError(
            f"{config.run_dir} has no scores yet: `retemper eval {config.run_dir}` and `retemper evals worker {config.run_dir}` make them"
        )
    heldout = eval_folder.heldout_of(config)
    for row in [
        COLUMNS,
        *(
            row
            for step in steps
            for row in (*_heldout_rows(config, step, heldout), *task_rows(config, step))
        ),
    ]:
        yield "{:>8}  {:<17}{:<26}{:>6}{:>9}  {:<18}{}".format(*row).rstrip()


def task_rows(config: Config, step: int) -> Iterator[tuple[str, ...]]:
    """COLUMNS of each task of a step. The difference is of the same problems, with its standard error and 95% interval."""
    base, tasks = (eval_folder.tasks_of(config, at) for at in (0, step))
    pair = Scored(config, 0), Scored(config, step)
    for task, scores in tasks.items():
        difference = _said(task_difference, *pair, task) if step and task in base else ""
        yield _row(
            step, task, scores["metric"], scores, "  ".join([difference, *_warnings(scores)])
        )
    if (found := forgetting(tasks)) is not None:
        metric = f"mean of {len(eval_folder.FORGOTTEN)}"
        compared = step and eval_folder.forgetting(base) is not None
        difference = _said(forgetting_difference, *pair) if compared else ""
        yield _row(step, "forgetting score", metric, found.headline(metric), difference)
    for home in eval_folder.homes(config, step):
        for task, error in eval_folder.read_errors(home, step).items():
            if task not in tasks:
                yield str(step), task, f"was not scored: {error}", "", "", "", ""


def _heldout_rows(
    config: Config, step: int, heldout: dict[int, dict[str, dict]]
) -> Iterator[tuple[str, ...]]:
    pair = Scored(config, 0), Scored(config, step)
    for domain, scores in heldout.get(step, {}).items():
        difference = (
            _said(heldout_difference, *pair, domain)
            if step and domain in heldout.get(0, {})
            else ""
        )
        yield _row(
            step, domain, "bits_per_byte", scores | {"score": scores["bits_per_byte"]}, difference
        )


def _row(step: int, name: str, metric: str, scores: dict, difference: str) -> tuple[str, ...]:
    interval = "{:.4f} to {:.4f}".format(*scores["interval"])
    return (
        str(step),
        name,
        metric,
        str(scores["samples"]),
        f"{scores['score']:.4f}",
        interval,
        difference,
    )


def _warnings(scores: dict) -> Iterator[str]:
    """What a score is to be read with: which training streams may hold the task's problems, and how many prompts lost their beginning."""
    if streams := [name for name, clean in scores["decontaminated"].items() if not clean]:
        yield f"not decontaminated in {', '.join(streams)}"
    if cut := scores.get("cut_prompts"):
        yield f"{cut} prompts cut to the model's length"


def _said(difference: Callable[..., Estimate], *of) -> str:
    """A paired difference, or why there is none: the scores stand, whatever became of the files beside them."""
    try:
        found = difference(*of)
    except UserError as error:
        return f"not to be compared: {error}"
    if found.stderr == 0:
        return f"{found.value:+.4f} on each of {found.problems}"  # which is no certainty of others
    return f"{found.value:+.4f} ± {found.stderr:.4f} ({found.low:+.4f} to {found.high:+.4f})"
