"""Shards to micro-batches. Shapes: B micro-batch, T sequence length."""

from dataclasses import dataclass

import numpy as np
import torch

from retemper.pipeline.data.corpus import TokenShards
from retemper.pipeline.data.order import sample_ids
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.schema import Config


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens_BT, labels_BT, position_ids_BT int64; loss_mask_BT float, 1 where the label counts."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor


def make_batch(tokens_BT: np.ndarray, device: torch.device) -> Batch:
    """Next-token prediction within each sample: the last position has no label."""
    tokens_BT = torch.from_numpy(tokens_BT).to(device)
    loss_mask_BT = torch.ones(tokens_BT.shape, device=device)
    loss_mask_BT[:, -1] = 0
    positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand_as(tokens_BT)
    return Batch(tokens_BT, tokens_BT.roll(-1, dims=1), loss_mask_BT, positions_BT)


class TrainingBatches:
    """The micro-batches of any step for one data-parallel rank."""

    def __init__(self, config: Config, topology: Topology):
        self.config, self.topology = config, topology
        self.shards = TokenShards(config.data.path, "train")

    def of_step(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that follows `consumed_samples`."""
        train = self.config.train
        ids = sample_ids(train.seed, len(self.shards), consumed_samples, train.global_batch_size)
        mine = np.split(ids, self.topology.data_parallel_size)[self.topology.data_parallel_rank]
        return [make_batch(self.shards.tokens(part), self.topology.device) for part in np.split(mine, len(mine) // train.micro_batch_size)]
