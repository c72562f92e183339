"""Score tasks on the live model one after another; a task that fails does not stop the others.

Only rank 0 imports this.
"""

from collections.abc import Iterator

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.harness import score_task
from retemper.pipeline.evals.run_tokenizer import load_tokenizer
from retemper.pipeline.evals.sharded_lm import ShardedLM
from retemper.pipeline.evals.team import RankZeroServer
from retemper.pipeline.schema.run import Config


def score_tasks(
    config: Config, team: RankZeroServer, names: list[str]
) -> Iterator[tuple[str, dict, list[dict]]]:
    """Score tasks on the live model.

    Args:
        config: The run's config.
        team: The ranks of the model; the others must be serving.
        names: Keys of evals.tasks.

    Yields:
        A task's name, its scores or {"error": …}, and a record for each of its problems.

    Raises:
        Exception: A computation on the ranks failed, so that they can no longer be used.
    """
    for name in names:
        yield name, *_attempt(name, config, team)


def _attempt(name: str, config: Config, team: RankZeroServer) -> tuple[dict, list[dict]]:
    try:
        return _score(name, config, team)
    except Exception as error:  # from files, the hub or lm-eval: training continues
        if team.in_flight:
            raise  # the other ranks are in the middle of a computation
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return {"error": message}, []


def _score(name: str, config: Config, team: RankZeroServer) -> tuple[dict, list[dict]]:
    return score_task(name, config, ShardedLM(team, load_tokenizer(config), config.seed, name))
