"""Samples to tensors: labels, the loss mask, positions and document boundaries. Shapes: B micro-batch, T sequence length."""

from dataclasses import dataclass, replace

import numpy as np
import torch


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
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()})


def make_batch(samples: list[dict[str, np.ndarray]], *, mask_documents: bool) -> Batch:
    """Next-token prediction within each sample, of what is neither padding nor prompt.

    With mask_documents a document sees itself alone: its first token is no label, and its positions begin at 0.
    """
    count, seq_length = len(samples), len(samples[0]["tokens"])
    shape = (1, count * seq_length) if mask_documents else (count, seq_length)
    tokens = np.empty(count * seq_length + 1, np.int64)  # labels are the tokens one place on: the same memory
    tokens[-1] = 0
    loss_mask_BT = np.zeros((count, seq_length), np.float32)
    for row, sample in enumerate(samples):
        tokens[row * seq_length : (row + 1) * seq_length] = sample["tokens"]
        mark_labels(loss_mask_BT[row, :-1], sample, mask_documents=mask_documents)
    tokens = torch.from_numpy(tokens)
    batch = tokens[:-1].view(shape), tokens[1:].view(shape), torch.from_numpy(loss_mask_BT).view(shape)
    if not mask_documents:
        return Batch(shape, *batch, torch.arange(seq_length).expand(shape))
    lengths = np.concatenate([_with_padding(sample) for sample in samples])
    edges = np.concatenate([[0], lengths.cumsum()])
    positions = torch.from_numpy(np.arange(count * seq_length) - np.repeat(edges[:-1], lengths))
    return Batch(shape, *batch, positions.view(shape), torch.from_numpy(edges.astype(np.int32)), int(lengths.max()))


def mark_labels(mask: np.ndarray, sample: dict[str, np.ndarray], *, mask_documents: bool) -> None:
    """Set what counts among the tokens of a sample after its first, in a mask of zeros (T - 1,): neither padding nor prompt."""
    lengths = sample["lengths"].tolist()
    prompts = sample["prompt_lengths"].tolist() if "prompt_lengths" in sample else [0] * len(lengths)
    start = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        first = max(1, start + max(prompt, int(mask_documents)))
        mask[first - 1 : start + length - 1] = 1
        start += length


def _with_padding(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Lengths of the pieces of documents; padding is a piece of its own."""
    padding = len(sample["tokens"]) - int(sample["lengths"].sum())
    return np.append(sample["lengths"], padding)[: None if padding else -1]
