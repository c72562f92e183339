"""The format of a token corpus, which `retemper tokenize` writes and training reads."""

import numpy as np

TRAIN, HELDOUT = "train", "heldout"  # the names of the splits, and of their folders

# The columns of a sample beside "tokens": one value for each piece of a document in it, as
# little-endian bytes. lengths: tokens of the piece, what they leave over is padding; documents: the
# number of its document; prompt_lengths: leading tokens without loss, in instruction pairs alone.
PIECES = {"lengths": "<u4", "documents": "<u8", "prompt_lengths": "<u4"}

# Of the 64 bits of a document's number: the position in its source file. The file's number is above.
_POSITION_BITS = 40


def document_numbers(files: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the numbers of documents, little-endian uint64 (documents,).

    files: lines of sources.jsonl, (documents,); positions: byte offsets or rows in those files.
    """
    return (files.astype(np.uint64) << np.uint64(_POSITION_BITS) | positions).astype("<u8")


def split_number(number: int) -> tuple[int, int]:
    """Return the line of sources.jsonl and the position in that file of a document, by its number."""
    return number >> _POSITION_BITS, number & ((1 << _POSITION_BITS) - 1)
