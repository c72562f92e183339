"""The conversion of samples to tensors: labels, loss mask, positions and document boundaries.

Shapes: B micro-batch, T sequence length.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from retemper.pipeline.data.loss_mask import lengths_and_loss_mask, ranges
from retemper.pipeline.data.mds import Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch of `shape` (B, T).

    tokens_BT, labels_BT and position_ids_BT are int64. loss_mask_BT is float, 1 where the label
    counts in the loss.

    With document masking B is 1: the samples are concatenated, and document_edges, int32
    (documents + 1,), contains the start of each document and the end of the last one. The batch of
    a pipeline stage that needs no tokens has no tensors.
    """

    shape: tuple[int, int]
    tokens_BT: torch.Tensor | None = None
    labels_BT: torch.Tensor | None = None
    loss_mask_BT: torch.Tensor | None = None
    position_ids_BT: torch.Tensor | None = None
    document_edges: torch.Tensor | None = None
    longest_document: int = 0
    # Of a mixture: the number of streams, and int64 (samples,), to which of them a sample belongs.
    streams: int = 0
    stream_numbers: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, copied without waiting for pending computation."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            **{
                name: value.to(device, non_blocking=True)
                for name, value in self.pinned()._tensors().items()
            },
        )

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        # Masks may be expanded views of a single number, which cannot be pinned.
        return replace(
            self,
            **{name: value.contiguous().pin_memory() for name, value in self._tensors().items()},
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }

    def shard_for_context_parallel(self, rank: int, size: int) -> "Batch":
        """Return the part of every sequence that belongs to a context-parallel rank.

        It is an early and a late chunk, as megatron-core distributes them, so that causal attention
        costs the same on all ranks. `shape` remains that of whole sequences.

        Args:
            rank: context-parallel rank.
            size: number of context-parallel ranks.
        """
        if size == 1:
            return self

        def part(tensor_BT: torch.Tensor) -> torch.Tensor:
            parts = tensor_BT.chunk(2 * size, dim=1)
            return torch.cat([parts[rank], parts[-1 - rank]], dim=1)

        return replace(
            self,
            **{
                name: part(value) for name, value in self._tensors().items() if name.endswith("_BT")
            },
        )


def make_batches(samples: Samples, micro_batch_size: int, *, mask_documents: bool) -> list[Batch]:
    """Return micro-batches for next-token prediction within each sample.

    Padding and prompts have no loss.

    Args:
        samples: samples of equal length.
        micro_batch_size: samples per micro-batch.
        mask_documents: restrict every token to its own document, whose first token is not a label
            and whose positions begin at 0.
    """
    lengths, loss_mask = lengths_and_loss_mask(samples, mask_documents=mask_documents)
    size = micro_batch_size * samples.seq_length
    # Labels and their loss mask are views of the same memory, shifted by one token.
    parts = zip(
        *(
            torch.from_numpy(flat).split(size)
            for flat in (samples.tokens[:-1], samples.tokens[1:], loss_mask[1:])
        ),
        strict=True,
    )
    if not mask_documents:
        return [_sample_batch(samples.seq_length, part) for part in parts]
    batch_ends = np.arange(size, len(samples) * samples.seq_length, size)
    lengths_of_batch = np.split(lengths, np.searchsorted(lengths.cumsum(), batch_ends, "right"))
    return [_document_batch(*pair) for pair in zip(lengths_of_batch, parts, strict=True)]


def _sample_batch(seq_length: int, part: tuple[torch.Tensor, ...]) -> Batch:
    tokens_BT, labels_BT, loss_mask_BT = (flat.view(-1, seq_length) for flat in part)
    return Batch(
        tokens_BT.shape,
        tokens_BT,
        labels_BT,
        loss_mask_BT,
        torch.arange(seq_length).expand_as(tokens_BT),
    )


def _document_batch(lengths: np.ndarray, part: tuple[torch.Tensor, ...]) -> Batch:
    tokens_BT, labels_BT, loss_mask_BT = (flat.view(1, -1) for flat in part)
    edges = np.append(0, lengths.cumsum())
    positions = torch.from_numpy(ranges(np.zeros_like(lengths), lengths)).view(1, -1)
    return Batch(
        tokens_BT.shape,
        tokens_BT,
        labels_BT,
        loss_mask_BT,
        positions,
        torch.from_numpy(edges.astype(np.int32)),
        int(lengths.max()),
    )
