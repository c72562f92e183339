"""The datatrove step that turns documents into token ids."""

from collections.abc import Iterator

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.tokenize.encoder import EncoderName, load_encoder

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 4 << 20


class Encode(PipelineStep):
    """Write token_ids, prompt_tokens and bytes into each document's metadata and drop its text."""

    name, type = "🔢 Encode", "🔢 - TOKENIZER"

    def __init__(self, tokenizer: Tokenizer, encoder: EncoderName, *, bos: bool, eos: bool):
        super().__init__()
        self.folder = str(tokenizer.folder)
        self.sha256 = tokenizer.sha256
        self.encoder = encoder
        self.before = np.array([tokenizer.bos_id] if bos else [], tokenizer.dtype)
        self.after = np.array([tokenizer.eos_id] if eos else [], tokenizer.dtype)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        encoder = load_encoder(self.folder, self.sha256, self.encoder)
        before, after = self.before, self.after
        for documents in batches(data):
            prompts = [
                document.text[: document.metadata["prompt_chars"]].encode()
                for document in documents
            ]
            texts = [document.metadata.pop("utf8") for document in documents]
            for document in documents:
                document.text = ""
            # The prompt's tokens are the common prefix of its encoding and the document's: a token
            # that spans the end of the prompt is in the loss.
            encoded_prompts = (
                encoder.encode(prompts) if any(prompts) else [before[:0]] * len(documents)
            )
            for document, text, ids, prompt in zip(
                documents, texts, encoder.encode(texts), encoded_prompts, strict=True
            ):
                prompt_tokens = _common_prefix(prompt, ids)
                document.metadata |= {
                    "token_ids": np.concatenate(
                        [before, ids, after], dtype=before.dtype, casting="unsafe"
                    ),
                    "prompt_tokens": len(before) + prompt_tokens if prompt_tokens else 0,
                    "bytes": len(text),
                }
                yield document


def _common_prefix(prompt: np.ndarray, ids: np.ndarray) -> int:
    """Return the number of leading ids that are equal."""
    count = min(len(prompt), len(ids))
    different = np.flatnonzero(prompt[:count] != ids[:count])
    return int(different[0]) if len(different) else count


def batches(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    """Yield documents in batches of limited count and bytes."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.metadata["utf8"])
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
