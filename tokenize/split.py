"""What a document is known by: the hash of its content, and from it its split and its place in the order."""

import hashlib

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import HELDOUT, TRAIN


def split_of(text: str, heldout_fraction: float) -> str:
    """`heldout` for that fraction of all texts, chosen by SHA-256 of the content, so that copies stay together."""
    return _split(hashlib.sha256(text.encode()).digest(), heldout_fraction)


class Identify(PipelineStep):
    """Write utf8, digest, split and priority into each document's metadata.

    Documents are taken in the order of their priority, a hash of seed and content: a function of the document alone, so that
    tasks, restarts and machines cannot change the order. Copies share a priority, and meet there; where copies are kept,
    the document's id enters, or they would stand side by side.
    """

    name = "🪪 Identify"
    type = "🔻 - FILTER"

    def __init__(self, *, seed: int, heldout_fraction: float, duplicates: bool):
        super().__init__()
        self.key = seed.to_bytes(8, "big")
        self.heldout_fraction = heldout_fraction
        self.duplicates = duplicates

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            utf8 = document.text.encode()
            digest = hashlib.sha256(utf8).digest()
            identity = (
                digest
                if self.duplicates
                else digest + document.id.encode("utf-8", "surrogateescape")
            )
            document.metadata |= {
                "utf8": utf8,
                "digest": digest,
                "split": _split(digest, self.heldout_fraction),
                "priority": int.from_bytes(
                    hashlib.blake2b(identity, digest_size=8, key=self.key).digest(), "big"
                ),
            }
            del utf8  # the encode step lets go of it
            yield document


def _split(digest: bytes, heldout_fraction: float) -> str:
    return HELDOUT if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction else TRAIN
