"""Held-out loss in bits per byte, on the live sharded model. Shapes: B micro-batch, T sequence length."""

import io
import math
from collections.abc import Iterable

import numpy as np
import torch

from retemper.pipeline.data.batch import make_batches
from retemper.pipeline.data.corpus import cache_folder
from retemper.pipeline.data.manifest import read_listed
from retemper.pipeline.data.order import Order, Stream
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.distributed.topology import Topology, from_last_stage
from retemper.pipeline.model.forward import run_schedule
from retemper.pipeline.schema import Config

_CHOICE = 0  # the seed of the held-out choice: the same samples for every run that compares


@torch.no_grad()
def heldout_scores(config: Config, topology: Topology, model, domains: Iterable[str]) -> dict[str, dict[str, float]]:
    """domain -> bits_per_byte, loss (nats per token), tokens, bytes and samples, the same on every rank.

    Bits per byte divides the loss of all predicted tokens by the UTF-8 bytes they stand for, so that models with
    different tokenizers compare; end-of-text, which stands for no bytes, does not count.
    """
    model.eval()
    scores = {domain: _score(config, topology, model, domain) for domain in domains}
    model.train()
    return scores


def _score(config: Config, topology: Topology, model, domain: str) -> dict[str, float]:
    path = config.evals.heldout[domain]
    shards = TokenShards(path, "heldout", cache_folder(config, f"heldout-{domain}"))
    token_bytes = np.load(io.BytesIO(read_listed(path, shards.manifest, "token_bytes.npy")), allow_pickle=False)
    token_bytes = torch.from_numpy(token_bytes).to(topology.device)
    samples = min(len(shards), config.evals.max_samples)
    # A fixed random choice: the first samples would be the first few documents by name.
    chosen = Order((Stream(_CHOICE, shards.shard_sizes, 1),)).batch(0, samples)
    mine = np.array_split(chosen, topology.data_parallel_size)[topology.data_parallel_rank]
    nats = tokens = bytes_ = 0.0
    for ids in _parts(mine, config.evals.micro_batch_size):
        [batch] = make_batches(shards.samples(ids), len(ids), mask_documents=config.data.mask_documents)
        batch = batch.of_context_rank(topology.context_parallel_rank, config.parallel.context_parallel_size).to(topology.device)
        for output in run_schedule(model, [batch], forward_only=True):
            bytes_BT = token_bytes[batch.labels_BT] * batch.loss_mask_BT
            nats += (output["losses_BT"].double() * (bytes_BT > 0)).sum().item()
            tokens += (bytes_BT > 0).sum().item()
            bytes_ += bytes_BT.sum().item()
    nats, tokens, bytes_ = from_last_stage([nats, tokens, bytes_])
    return {
        "bits_per_byte": nats / math.log(2) / max(bytes_, 1),
        "loss": nats / max(tokens, 1),
        "tokens": int(tokens),
        "bytes": int(bytes_),
        "samples": samples,
    }


def _parts(ids: np.ndarray, size: int) -> list[np.ndarray]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
