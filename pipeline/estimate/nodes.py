"""The number of nodes of a run, and of ranks per node."""

from dataclasses import dataclass

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class Layout:
    """The nodes of a job, with one rank per GPU."""

    job_name: str
    nodes: int
    ranks_per_node: int


def layout_of(config: Config, gpus_per_node: int) -> Layout:
    """Return the layout that fills nodes of gpus_per_node GPUs.

    Raises:
        UserError: the world size does not fill the nodes.
    """
    world_size = config.parallel.world_size
    if world_size > gpus_per_node and world_size % gpus_per_node:
        raise UserError(
            f"{world_size} ranks do not fill nodes of {gpus_per_node} GPUs: "
            "change parallel.*_size or --gpus-per-node so that one divides the other"
        )
    return Layout(
        f"retemper-{config.study}-{config.name}",
        max(1, world_size // gpus_per_node),
        min(world_size, gpus_per_node),
    )
