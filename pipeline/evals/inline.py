"""Tasks on the live model, one after the other: what one of them does wrong is its own matter. Rank 0 alone imports this."""

from collections.abc import Iterator

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.harness import score_task
from retemper.pipeline.evals.run_tokenizer import load_tokenizer
from retemper.pipeline.evals.sharded_lm import ShardedLM
from retemper.pipeline.evals.team import Team
from retemper.pipeline.schema.run import Config


def score_tasks(
    config: Config, team: Team, names: list[str]
) -> Iterator[tuple[str, dict, list[dict]]]:
    """For each task its name, its scores or {"error": …}, and a record for each of its problems."""
    for name in names:
        yield name, *_attempt(name, config, team)


def _attempt(name: str, config: Config, team: Team) -> tuple[dict, list[dict]]:
    try:
        return _score(name, config, team)
    except Exception as error:  # of files, of the hub, of lm-eval: the run goes on
        if team.in_flight:
            raise  # the other ranks are in the midst of computing
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return {"error": said}, []


def _score(name: str, config: Config, team: Team) -> tuple[dict, list[dict]]:
    return score_task(name, config, ShardedLM(team, load_tokenizer(config), config.seed, name))
