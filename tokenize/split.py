"""Held-out documents, set apart by content hash before anything else sees them."""

import hashlib

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

TRAIN, HELDOUT = "train", "heldout"


def split_of(text: str, heldout_fraction: float) -> str:
    """`heldout` for that fraction of all texts, chosen by SHA-256 of the content, so that copies stay together."""
    position = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return HELDOUT if position < heldout_fraction else TRAIN


class SplitByHash(PipelineStep):
    """Write each document's split into its metadata."""

    name = "✂ Held-out split"
    type = "🔻 - FILTER"

    def __init__(self, heldout_fraction: float):
        super().__init__()
        self.heldout_fraction = heldout_fraction

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            document.metadata["split"] = split_of(document.text, self.heldout_fraction)
            self.stat_update(document.metadata["split"])
            yield document
