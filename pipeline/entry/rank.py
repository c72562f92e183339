"""What every rank of a launched job does around its work: check the input, join, work, report one clear error."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.distributed import environment
from retemper.pipeline.distributed import topology as topologies
from retemper.pipeline.distributed.collectives import from_rank_zero
from retemper.pipeline.distributed.signals import follow_launcher
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

# What every rank finds, rank 0 says: the launcher ends the others once it has left. What one other rank finds, that
# rank says after this time.
_SECONDS_FOR_RANK_ZERO = 5


def run_rank(
    load: Callable[[], Config], work: Callable[[Config, topologies.Topology, dict[str, Any]], None]
) -> int:
    """Load and check the config, start the process groups, call work(config, topology, fingerprints). Returns the exit code."""

    from retemper.pipeline.model.kernels import check_graph, check_precision

    def prepare() -> tuple[Config, dict[str, Any]]:
        config = load()
        topologies.check_world_size(config)
        _prepare_environment(config)  # before check_precision, which starts CUDA
        prepared = preflight(config)
        check_precision(config)
        check_graph(config)
        return config, prepared

    return run_prepared(prepare, work)


def run_prepared[Setup: ModelSetup](
    prepare: Callable[[], tuple[Setup, dict[str, Any]]],
    work: Callable[[Setup, topologies.Topology, dict[str, Any]], None],
) -> int:
    """prepare() checks the input and gives a setup and fingerprints; then work(setup, topology, fingerprints). Returns the exit code.

    Whatever the person got wrong is refused before any process group starts, and said once.
    """
    follow_launcher()
    try:
        setup, prepared = prepare()
        topology = topologies.start(setup.parallel)
        prepared = _inputs_of_rank_zero(topology.rank, prepared)
        work(setup, topology, prepared)
    except (UserError, OSError) as error:
        _say(error)
        return 1
    topologies.stop()
    return 0


def leave(code: int) -> NoReturn:
    """End this process: everything is closed by now, and what native libraries say of themselves at an interpreter's end helps nobody."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare_environment(config: Config) -> None:
    warning = environment.prepare(config.parallel).warning
    if warning and topologies.is_main_process():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _inputs_of_rank_zero(rank: int, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's fingerprints. Raises UserError where this rank has others.

    A path may lead to other files on another node. Of a base that still trains, ranks may have seen
    different newest checkpoints: rank 0's counts, and every rank that loads it compares its files.
    """
    expected = from_rank_zero(fingerprints)
    changes = [
        change for change in changed_keys(expected, fingerprints) if not change.startswith("base:")
    ]
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"rank {rank} has other inputs than rank 0:\n{listed}\n"
            "Give every node the same data.path and tokenizer"
        )
    return expected


def _say(error: Exception) -> None:
    if not topologies.is_main_process():
        time.sleep(_SECONDS_FOR_RANK_ZERO)
    print(f"error: {error}", file=sys.stderr, flush=True)
