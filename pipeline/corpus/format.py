"""The format of a token corpus, which `retemper tokenize` writes and training reads."""

import numpy as np

TRAIN, HELDOUT = "train", "heldout"  # the names of the splits, and of their folders

# The columns of a sample besides "tokens": one value for each piece of a document in the sample, as
# little-endian bytes. lengths: tokens of the piece, and the rest of the sample is padding;
# documents: the number of the piece's document; prompt_lengths: leading tokens of the piece that
# the loss mask excludes, a column that only corpora of instruction pairs have.
PIECES = {"lengths": "<u4", "documents": "<u8", "prompt_lengths": "<u4"}

# The low bits of a 64-bit document number: the position in the source file. The high bits are the
# number of the file.
_POSITION_BITS = 40


def document_numbers(files: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the numbers of documents, little-endian uint64 (documents,).

    Args:
        files: The lines of the source files in sources.jsonl, (documents,).
        positions: The byte offsets or row numbers in those files, (documents,).
    """
    return (files.astype(np.uint64) << np.uint64(_POSITION_BITS) | positions).astype("<u8")


def split_number(number: int) -> tuple[int, int]:
    """Return the line of sources.jsonl and the position in that file that a number encodes."""
    return number >> _POSITION_BITS, number & ((1 << _POSITION_BITS) - 1)
