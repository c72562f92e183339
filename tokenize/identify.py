"""The identity of a document: the hash of its content, which determines its split and its order."""

import hashlib

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.format import HELDOUT, TRAIN


def split_of(text: str, heldout_fraction: float) -> str:
    """Return the split of a text: `heldout` for the given fraction of all texts, else `train`.

    It is chosen by the SHA-256 of the content, so that copies are in the same split.
    """
    return _split(hashlib.sha256(text.encode()).digest(), heldout_fraction)


class Identify(PipelineStep):
    """Write utf8, digest, split and priority into each document's metadata.

    The documents of a corpus are in the order of their priority, a hash of seed and content. It
    depends on the document only, so that tasks, restarts and machines cannot change the order.
    Copies have the same priority, and so are found beside each other. If copies are kept, the
    priority also depends on the document's id, or copies would be neighbours in the corpus.
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
            del utf8  # so that the encode step can free it
            yield document


def _split(digest: bytes, heldout_fraction: float) -> str:
    return HELDOUT if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction else TRAIN
