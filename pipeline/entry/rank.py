"""The entry point of every rank of a launched job.

It checks the input, joins the process groups, does the work and reports one clear error.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.distributed import environment
from retemper.pipeline.distributed import topology as topologies
from retemper.pipeline.distributed.collectives import broadcast_from_rank0
from retemper.pipeline.distributed.signals import die_with_launcher
from retemper.pipeline.distributed.unexpected import report_unexpected
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError, masked
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

# An error that all ranks raise is printed by rank 0 only: the launcher kills the others once rank 0
# has exited. An error that only another rank raises is printed by that rank after this delay.
_SECONDS_FOR_RANK_ZERO = 5
# When another rank has exited, collectives fail on rank 0, which the launcher kills within this
# delay: their errors would hide the message of the other rank.
_SECONDS_FOR_OTHERS = 2


def run_rank(
    load: Callable[[], Config], work: Callable[[Config, topologies.Topology, dict[str, Any]], None]
) -> int:
    """Load and check a config, start the process groups and do the work.

    Args:
        load: returns the config; may raise UserError.
        work: is called as work(config, topology, fingerprints).

    Returns:
        The exit code.
    """
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
    error_file: str | None = None,
) -> int:
    """Call prepare(), start the process groups, call work(setup, topology, fingerprints).

    User errors are detected before any process group starts, and printed once. Of an unexpected
    error one line is printed; its trace is in a file.

    Args:
        prepare: checks the input and returns a setup and fingerprints.
        work: gets rank 0's fingerprints.
        error_file: to which the message of an error is written, too.

    Returns:
        The exit code.
    """
    die_with_launcher()
    setup = None
    try:
        setup, prepared = prepare()
        topology = topologies.start(setup.parallel)
        prepared = _inputs_of_rank_zero(topology.rank, prepared)
        work(setup, topology, prepared)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        foreseen = isinstance(error, UserError | OSError)
        message = masked(str(error)) if foreseen else report_unexpected(error, _folder_of(setup))
        if error_file:
            Path(error_file).write_text(message)
        _print_error(message, foreseen=foreseen)
        return 1
    topologies.stop()
    return 0


def _prepare_environment(config: Config) -> None:
    tensorwise_attention = config.fp8.attention and config.fp8_recipe == "tensorwise"
    warning = environment.prepare(
        config.parallel, tensorwise_attention=tensorwise_attention
    ).warning
    if warning and topologies.is_main_process():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _inputs_of_rank_zero(rank: int, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Return rank 0's fingerprints, after a comparison with those of this rank.

    The same path may lead to other files on another node. If the base is still being trained, ranks
    may have seen different newest checkpoints: that of rank 0 is used, and every rank that loads it
    compares its files.

    Raises:
        UserError: this rank has other data or another tokenizer.

    Collective: every rank must call this.
    """
    expected = broadcast_from_rank0(fingerprints)
    changes = [
        change for change in changed_keys(expected, fingerprints) if not change.startswith("base:")
    ]
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"rank {rank} has other inputs than rank 0:\n{listed}\n"
            "Provide the same data.path and tokenizer on every node"
        )
    return expected


def _folder_of(setup: ModelSetup | None) -> Path | None:
    """Return the folder of the run, if there is one."""
    return setup.run_dir if isinstance(setup, Config) and setup.run_dir.is_dir() else None


def _print_error(message: str, *, foreseen: bool) -> None:
    if not topologies.is_main_process():
        time.sleep(_SECONDS_FOR_RANK_ZERO)
    elif not foreseen:
        time.sleep(_SECONDS_FOR_OTHERS)
    print(f"error: {message}", file=sys.stderr, flush=True)
