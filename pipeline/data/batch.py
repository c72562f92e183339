"""Samples to tensors: labels, the loss mask, positions and document boundaries. Shapes: B micro-batch, T sequence length."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from retemper.pipeline.data.mds import Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch of `shape` (B, T): tokens_BT, labels_BT, position_ids_BT int64; loss_mask_BT float, 1 where the label counts.

    With document masking B is 1: the samples stand one after the other, and document_edges, int32 (documents + 1,), say where
    each document begins and the last ends. A pipeline stage that looks at no tokens has none.
    """

    shape: tuple[int, int]
    tokens_BT: torch.Tensor | None = None
    labels_BT: torch.Tensor | None = None
    loss_mask_BT: torch.Tensor | None = None
    position_ids_BT: torch.Tensor | None = None
    document_edges: torch.Tensor | None = None
    longest_document: int = 0

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, copied without waiting for what it computes."""
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
        """The batch in memory from which a GPU can copy while the host goes on."""
        # Masks may be views expanded from one number, which cannot be pinned.
        return replace(
            self,
            **{name: value.contiguous().pin_memory() for name, value in self._tensors().items()},
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }

    def of_context_rank(self, rank: int, size: int) -> "Batch":
        """An early and a late part of every sequence, as megatron-core deals them out to context-parallel ranks: causal attention
        costs all of them alike. `shape` stays that of whole sequences."""
        if size == 1:
            return self

        def part(tensor_BT: torch.Tensor) -> torch.Tensor:
            parts = tensor_BT.chunk(2 * size, dim=1)
            return torch.cat([parts[rank], parts[-1 - rank]], dim=1)

        return replace(
            self,
            **{
                name: part(value)
                for name, value in vars(self).items()
                if isinstance(value, torch.Tensor)
            },
        )


def make_batches(samples: Samples, micro_batch_size: int, *, mask_documents: bool) -> list[Batch]:
    """Micro-batches of next-token prediction within each sample, of what is neither padding nor prompt.

    With mask_documents a document sees itself alone: its first token is no label, and its positions begin at 0.
    """
    lengths, learned = learned_tokens(samples, mask_documents=mask_documents)
    size = micro_batch_size * samples.seq_length
    # Labels, and which of them count, are what stands one place on: the same memory.
    parts = zip(
        *(
            torch.from_numpy(flat).split(size)
            for flat in (samples.tokens[:-1], samples.tokens[1:], learned[1:])
        ),
        strict=True,
    )
    if not mask_documents:
        return [_of_samples(samples.seq_length, part) for part in parts]
    batch_ends = np.arange(size, len(samples) * samples.seq_length, size)
    lengths_of_batch = np.split(lengths, np.searchsorted(lengths.cumsum(), batch_ends, "right"))
    return [_of_documents(*pair) for pair in zip(lengths_of_batch, parts, strict=True)]


def learned_tokens(samples: Samples, *, mask_documents: bool) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the pieces of documents, one sample after the other, and for each token, float32, 1 where it is learned.

    Padding is a piece of its own. One more token, not learned, stands at the end.
    """
    lengths = samples.values("lengths").astype(np.int64)
    prompts = samples.values("prompt_lengths").astype(np.int64)
    ends = (
        np.cumsum([len(pieces) for pieces in samples.pieces["lengths"]])
        // samples.values("lengths").itemsize
    )
    padding = samples.seq_length - np.add.reduceat(lengths, np.append(0, ends[:-1]))
    lengths, prompts = (
        np.insert(pieces, ends, padding) for pieces in (lengths, prompts)
    )  # padding is all prompt
    some = lengths > 0
    lengths = lengths[some]
    prompts = prompts[some]
    starts = lengths.cumsum() - lengths
    learned = np.ones(len(samples.tokens), np.float32)
    learned[:: samples.seq_length] = 0  # nothing before them foretells them
    if mask_documents:
        learned[starts] = 0
    learned[_ranges(starts, prompts)] = 0
    return lengths, learned


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All numbers from each start on, as many as its length."""
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def _of_samples(seq_length: int, part: tuple[torch.Tensor, ...]) -> Batch:
    tokens_BT, labels_BT, loss_mask_BT = (flat.view(-1, seq_length) for flat in part)
    return Batch(
        tokens_BT.shape,
        tokens_BT,
        labels_BT,
        loss_mask_BT,
        torch.arange(seq_length).expand_as(tokens_BT),
    )


def _of_documents(lengths: np.ndarray, part: tuple[torch.Tensor, ...]) -> Batch:
    tokens_BT, labels_BT, loss_mask_BT = (flat.view(1, -1) for flat in part)
    edges = np.append(0, lengths.cumsum())
    positions = torch.from_numpy(_ranges(np.zeros_like(lengths), lengths)).view(1, -1)
    return Batch(
        tokens_BT.shape,
        tokens_BT,
        labels_BT,
        loss_mask_BT,
        positions,
        torch.from_numpy(edges.astype(np.int32)),
        int(lengths.max()),
    )
