"""Token ids out: documents encoded, joined by end-of-text, cut into samples of seq_length, written as MDS shards."""

import itertools
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.tokenize.split import HELDOUT, TRAIN
from retemper.tokenize.tokenizer import Tokenizer

_DOCUMENTS_PER_BATCH = 256


class Encode(PipelineStep):
    """Put the token ids of each document, ended by end-of-text, into its metadata."""

    name = "🔢 Encode"
    type = "🔢 - TOKENIZER"

    def __init__(self, tokenizer_folder: str):
        super().__init__()
        self.tokenizer_folder = tokenizer_folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tokenizer = Tokenizer(self.tokenizer_folder)
        for documents in itertools.batched(data, _DOCUMENTS_PER_BATCH):
            for document, ids in zip(documents, tokenizer.encode([document.text for document in documents]), strict=True):
                document.metadata["token_ids"] = [*ids, tokenizer.eos_id]
                yield document


class WriteShards(PipelineStep):
    """Concatenate the ids of each split and write full samples; the tail that fills no sample is counted as dropped."""

    name = "💾 MDS shards"
    type = "💽 - WRITER"

    def __init__(self, folder: str, seq_length: int, vocab_size: int):
        super().__init__()
        self.folder, self.seq_length = folder, seq_length
        self.dtype = token_dtype(vocab_size)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:{self.dtype}:{self.seq_length}"}
        writers = {
            split: MDSWriter(columns=columns, out=str(Path(self.folder, split, f"{rank:05d}")), hashes=["sha256"])
            for split in (TRAIN, HELDOUT)
        }
        pending = {split: [] for split in writers}
        for document in data:
            split = document.metadata["split"]
            ids = pending[split]
            ids += document.metadata.pop("token_ids")
            full = len(ids) - len(ids) % self.seq_length
            for start in range(0, full, self.seq_length):
                writers[split].write({"tokens": np.array(ids[start : start + self.seq_length], self.dtype)})
            self.stat_update(f"{split}_samples", value=full // self.seq_length)
            self.stat_update(f"{split}_bytes", value=len(document.text.encode("utf-8", "surrogatepass")))
            del ids[:full]
            yield document
        for split, writer in writers.items():
            self.stat_update(f"{split}_dropped_tail_tokens", value=len(pending[split]))
            writer.finish()


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
