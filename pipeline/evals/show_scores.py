"""Show the scores of a run's steps, and the difference of each from the run's initial model."""

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
    """Yield the lines of a table with the scores of each domain and task at each step.

    Raises UserError where the run has no scores.
    """
    if not (steps := eval_folder.steps_of(config)):
        raise UserError(f"{config.run_dir} has no scores yet: run {_scoring_commands(config)}")
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


def _scoring_commands(config: Config) -> str:
    """Return the commands that score what the run's config names, or what a command may name."""
    run = f"`retemper eval run {config.run_dir}`"
    worker = f"`retemper eval worker {config.run_dir}`"
    by_ranks = config.evals.heldout or config.evals.inline_tasks
    commands = [run] * bool(by_ranks) + [worker] * bool(config.evals.worker_tasks)
    return " or ".join(commands) or (
        f"`retemper eval run {config.run_dir} evals.heldout.NAME=FOLDER`, "
        "with the token shards of a domain"
    )


def task_rows(config: Config, step: int) -> Iterator[tuple[str, ...]]:
    """Yield a row, as in COLUMNS, for each task of a step.

    The difference from step 0 is paired by problem, with its standard error and 95% interval.
    """
    base, tasks = (eval_folder.tasks_of(config, at) for at in (0, step))
    pair = Scored(config, 0), Scored(config, step)
    for task, scores in tasks.items():
        difference = (
            _format_difference(task_difference, *pair, task) if step and task in base else ""
        )
        yield _row(
            step, task, scores["metric"], scores, "  ".join([difference, *_warnings(scores)])
        )
    if (score := forgetting(tasks)) is not None:
        metric = f"mean of {len(eval_folder.FORGETTING_TASKS)}"
        compared = step and eval_folder.forgetting(base) is not None
        difference = _format_difference(forgetting_difference, *pair) if compared else ""
        yield _row(step, "forgetting score", metric, score.headline(metric), difference)
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
            _format_difference(heldout_difference, *pair, domain)
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
    """Yield caveats of a score.

    They are the training streams that may contain the task's problems, and the number of prompts
    that were cut.
    """
    if streams := [name for name, clean in scores["decontaminated"].items() if not clean]:
        yield f"not decontaminated in {', '.join(streams)}"
    if cut := scores.get("cut_prompts"):
        yield f"{cut} prompts cut to the model's maximum length"


def _format_difference(difference: Callable[..., Estimate], *arguments) -> str:
    """Format a paired difference, or the reason why it cannot be computed.

    The scores are shown even where the records next to them are missing.
    """
    try:
        estimate = difference(*arguments)
    except UserError as error:
        return f"not comparable: {error}"
    if estimate.stderr == 0:
        # No interval: it would have no width, which says nothing about other problems.
        return f"{estimate.value:+.4f} on each of {estimate.problems}"
    return (
        f"{estimate.value:+.4f} ± {estimate.stderr:.4f} "
        f"({estimate.low:+.4f} to {estimate.high:+.4f})"
    )
