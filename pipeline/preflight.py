"""Everything about a run that can be refused before a process group starts."""

from pathlib import Path
from typing import Any

from retemper.pipeline import run_folder
from retemper.pipeline.checkpoint import commit
from retemper.pipeline.data.corpus import check_corpora
from retemper.pipeline.schema.run import Config


def preflight(config: Config) -> dict[str, Any]:
    """Check run folder, corpora and base, and return the fingerprints of data, tokenizer and base. Raises UserError."""
    run_folder.check(config)
    fingerprints = check_corpora(config)
    if config.init_from:
        fingerprints["base"] = commit.fingerprint(commit.newest(Path(config.init_from)))
    return fingerprints
