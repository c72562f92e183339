"""A trace of selected steps, recorded by torch's profiler."""

import contextlib

import torch

from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.runs import run_folder
from retemper.pipeline.schema.run import Config


@contextlib.contextmanager
def profiler(config: Config, topology: Topology, steps_done: int):
    """Yield a function to call after every step; rank 0 traces profile.steps into the run's folder.

    Args:
        config: of the run.
        topology: of this rank.
        steps_done: before the first call.
    """
    if not config.profile.steps or topology.rank != 0 or steps_done >= config.profile.steps[0]:
        yield lambda: None
        return
    first, last = config.profile.steps
    folder = config.run_dir / run_folder.PROFILE

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"steps-{first}-{last}.json"))

    schedule = torch.profiler.schedule(
        wait=first - steps_done - 1, warmup=0, active=last - first + 1, repeat=1
    )
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, profile_memory=True
    ) as profile:
        yield profile.step
