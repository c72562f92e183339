"""Tasks on the live model, one after the other: what one of them does wrong is its own matter. Rank 0 alone imports this."""

import logging
from collections.abc import Iterator

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retemper.pipeline.data.manifest import read_manifest
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.harness import ShardedLM, score_task
from retemper.pipeline.evals.team import Team
from retemper.pipeline.schema import Config
from retemper.tokenize.tokenizer import Tokenizer


def score_tasks(config: Config, team: Team, names: list[str]) -> Iterator[tuple[str, dict, list[dict]]]:
    """For each task its name, its scores or {"task", "error"}, and a record for each of its problems."""
    for name in names:
        yield name, *_attempt(name, config, team)


def _attempt(name: str, config: Config, team: Team) -> tuple[dict, list[dict]]:
    try:
        return _score(name, config, team)
    except Exception as error:  # of files, of the hub, of lm-eval: the run goes on
        if team.in_flight:
            raise  # the other ranks are in the midst of computing
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return {"task": name, "error": said}, []


def _score(name: str, config: Config, team: Team) -> tuple[dict, list[dict]]:
    for noisy in ("lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return score_task(name, config, ShardedLM(team, load_tokenizer(config), config.seed, name))


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The run's. Raises UserError where it is not the one that the corpus was made with, or larger than the model."""
    ours = Tokenizer(config.data.tokenizer)
    corpus = read_manifest(config.data.path)
    if ours.sha256 != corpus["tokenizer_sha256"]:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than that of the corpus {config.data.path}, which the model "
            "was trained on: name that one"
        )
    tokenizer = AutoTokenizer.from_pretrained(ours.folder, local_files_only=True, trust_remote_code=False)
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has {len(tokenizer)} tokens, model.vocab_size is only {config.model.vocab_size}: "
            "it is not this model's"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"data.tokenizer={config.data.tokenizer} names no end-of-text: give its tokenizer_config.json an eos_token")
    return tokenizer
