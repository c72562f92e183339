"""Held-out loss in bits per byte, on the live sharded model.

Shapes: B micro-batch, N samples, T sequence length.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from retemper.pipeline.corpus.format import HELDOUT
from retemper.pipeline.corpus.manifest import read_verified
from retemper.pipeline.data.batch import make_batches
from retemper.pipeline.data.order import Order, Stream
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.data.streams import cache_folder
from retemper.pipeline.distributed.collectives import all_reduce_from_last_stage
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.uncertainty import ratio
from retemper.pipeline.files.progress_bar import ProgressBar
from retemper.pipeline.model.forward import run_schedule
from retemper.pipeline.schema.run import Config

_SUBSET_SEED = 0  # fixed, so that all runs are scored on the same held-out samples


@dataclass(frozen=True)
class Heldout:
    """The held-out scores of one domain."""

    # bits_per_byte with stderr and interval, loss (nats per token), tokens, bytes, samples and
    # samples_available, of which they are a random subset
    scores: dict
    samples: list[dict]  # the number, bits and bytes of each sample


@torch.no_grad()
def heldout_scores(
    config: Config, topology: Topology, model, domains: Iterable[str]
) -> dict[str, Heldout]:
    """Return each domain's held-out scores, the same on every rank.

    Bits per byte is the loss of all predicted tokens divided by the UTF-8 bytes they represent, so
    that models with different tokenizers are comparable. End-of-text represents no bytes and is
    not counted.

    Args:
        config: The run's config.
        topology: This rank's position in the layout.
        model: The live model; it is left in training mode.
        domains: Keys of evals.heldout.

    Raises:
        UserError: A domain's samples have no token to predict.

    Collective: every rank must call this.
    """
    model.eval()
    scores = {domain: _score(config, topology, model, domain) for domain in domains}
    model.train()
    return scores


def _score(config: Config, topology: Topology, model, domain: str) -> Heldout:
    path = config.evals.heldout[domain]
    shards = TokenShards(path, HELDOUT, cache_folder(config, f"heldout-{domain}"))
    token_bytes = np.load(
        io.BytesIO(read_verified(path, shards.manifest, "token_bytes.npy")), allow_pickle=False
    )
    token_bytes = torch.from_numpy(token_bytes).to(topology.device)
    samples = min(len(shards), config.evals.max_samples)
    # A fixed random subset: the first samples would all come from the first few documents.
    chosen = Order((Stream(_SUBSET_SEED, shards.shard_sizes, 1),)).batch(0, samples)
    sums_N3 = np.zeros((samples, 3))  # nats, tokens and bytes per sample
    local_indices = np.array_split(np.arange(samples), topology.data_parallel_size)[
        topology.data_parallel_rank
    ]
    with ProgressBar(
        total=len(local_indices),
        desc=f"held-out {domain}",
        unit="sample",
        leave=False,
        disable=topology.rank > 0,
    ) as bar:
        for indices in _parts(local_indices, config.evals.micro_batch_size):
            [batch] = make_batches(
                shards.samples(chosen[indices]),
                len(indices),
                mask_documents=config.data.mask_documents,
            )
            batch = batch.shard_for_context_parallel(
                topology.context_parallel_rank, config.parallel.context_parallel_size
            ).to(topology.device)
            for output in run_schedule(model, [batch], forward_only=True):
                bytes_BT = token_bytes[batch.labels_BT] * batch.loss_mask_BT
                sums_B3 = _sums_of_samples(output["losses_BT"], bytes_BT, len(indices))
                sums_N3[indices] = sums_B3.cpu().numpy()
            bar.update(len(indices))
    nats_N, tokens_N, bytes_N = (
        np.array(all_reduce_from_last_stage(torch.from_numpy(sums_N3.ravel()))).reshape(-1, 3).T
    )
    if not tokens_N.sum():
        raise UserError(
            f"evals.heldout.{domain}={path}: none of the {samples} held-out samples read has a "
            "token to predict (all tokens are prompt, padding or without text), so there is no "
            "loss to measure. Name a corpus with held-out text, or remove the domain"
        )
    bits_N = nats_N / math.log(2)
    estimate = ratio(bits_N.tolist(), bytes_N.tolist())
    scores = {
        "bits_per_byte": estimate.value,
        "stderr": estimate.stderr,
        "interval": [estimate.low, estimate.high],
        "loss": nats_N.sum() / tokens_N.sum(),
        "tokens": int(tokens_N.sum()),
        "bytes": int(bytes_N.sum()),
        "samples": samples,
        "samples_available": len(shards),
    }
    rows = zip(chosen.tolist(), bits_N.tolist(), bytes_N.tolist(), strict=True)
    return Heldout(
        scores, [{"sample": sample, "bits": bits, "bytes": bytes_} for sample, bits, bytes_ in rows]
    )


def _sums_of_samples(losses_BT: torch.Tensor, bytes_BT: torch.Tensor, samples: int) -> torch.Tensor:
    """Sum the losses, tokens and bytes of each sample, over the tokens that represent bytes.

    Args:
        losses_BT: The loss of each position, in nats.
        bytes_BT: The UTF-8 bytes of each label, 0 where the loss mask excludes it.
        samples: The number of samples in the batch. With document masks B is 1, and the samples
            are concatenated along T.

    Returns:
        Nats, tokens and bytes of each sample, float64 (samples, 3).
    """
    losses_NT = losses_BT.double().reshape(samples, -1)
    bytes_NT = bytes_BT.double().reshape(samples, -1)
    counts_NT = bytes_NT > 0
    nats_N = (losses_NT * counts_NT).sum(1)
    return torch.stack([nats_N, counts_NT.double().sum(1), bytes_NT.sum(1)], 1)


def _parts(ids: np.ndarray, size: int) -> list[np.ndarray]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
