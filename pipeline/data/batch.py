"""Samples to tensors: labels, the loss mask, positions and document boundaries. Shapes: B micro-batch, T sequence length."""

from dataclasses import dataclass

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


def make_batch(samples: list[dict[str, np.ndarray]], device: torch.device, *, mask_documents: bool) -> Batch:
    """Next-token prediction within each sample, of what is neither padding nor prompt.

    With mask_documents a document sees itself alone: its first token is no label, and its positions begin at 0.
    """
    tokens_BT = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    counts_BT = np.stack([labels_T(sample, mask_documents=mask_documents) for sample in samples])
    lengths = [_with_padding(sample) for sample in samples]
    if mask_documents:
        tokens_BT, counts_BT = tokens_BT.reshape(1, -1), counts_BT.reshape(1, -1)
    else:
        lengths = [np.array([tokens_BT.shape[1]])] * len(samples)
    positions_BT = np.concatenate([np.arange(length) for sample in lengths for length in sample]).reshape(tokens_BT.shape)
    tokens_BT = torch.from_numpy(tokens_BT).to(device)
    edges = np.concatenate([[0], *lengths]).cumsum().astype(np.int32)
    return Batch(
        tuple(tokens_BT.shape),
        tokens_BT,
        tokens_BT.roll(-1, dims=1),
        torch.from_numpy(np.roll(counts_BT, -1, axis=1)).to(device, torch.float32),
        torch.from_numpy(positions_BT).to(device),
        torch.from_numpy(edges).to(device) if mask_documents else None,
        int(np.diff(edges).max()),
    )


def labels_T(sample: dict[str, np.ndarray], *, mask_documents: bool) -> np.ndarray:
    """Whether each token counts as a label, bool (T,): never the first of a sample, nor padding, nor a prompt."""
    counts_T = np.zeros(len(sample["tokens"]), bool)
    ends = np.cumsum(sample["lengths"], dtype=np.int64)
    counts_T[1 : ends[-1]] = True
    starts = ends - sample["lengths"]
    if mask_documents:
        counts_T[starts] = False
    for start, length in zip(starts, sample.get("prompt_lengths", ()), strict=False):
        counts_T[start : start + length] = False
    return counts_T


def _with_padding(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Lengths of the pieces of documents; padding is a piece of its own."""
    padding = len(sample["tokens"]) - int(sample["lengths"].sum())
    return np.append(sample["lengths"], padding)[: None if padding else -1]
