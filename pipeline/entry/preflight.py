"""All checks of a run that need no process group."""

from typing import Any

from retemper.pipeline.checkpoint.base import base_of
from retemper.pipeline.checkpoint.trunk import check_branches, check_trunk
from retemper.pipeline.data.streams import check_corpora
from retemper.pipeline.distributed.topology import is_main_process
from retemper.pipeline.evals.known_tasks import check_tasks
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config


def preflight(config: Config) -> dict[str, Any]:
    """Check run folder, tasks, trunk, branches, corpora and base before a run starts.

    Returns:
        The fingerprints of data, tokenizer and base.

    Raises:
        UserError: one of them is missing, was changed, or does not fit the config.
    """
    run_folder.check_resumable(config)
    if is_main_process():
        check_tasks(config.evals)
    check_trunk(config)
    check_branches(config)
    fingerprints = check_corpora(config)
    if base := base_of(config):
        fingerprints["base"] = base.fingerprint
    return fingerprints
