"""Test the packing of documents: every token is placed once, and only long documents are cut."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.tokenize.pack import best_fit, concat, one_by_one

LENGTHS = st.lists(st.integers(0, 50), max_size=80).map(lambda lengths: np.array(lengths, np.int64))
SEQ_LENGTH = st.integers(1, 20)


def pieces_by_document(samples) -> dict[int, list[tuple[int, int]]]:
    """Return document -> its pieces as (start, end), sorted by start."""
    pieces: dict[int, list] = {}
    for sample in samples:
        for document, start, count in sample:
            pieces.setdefault(document, []).append((start, start + count))
    return {document: sorted(found) for document, found in pieces.items()}


@given(LENGTHS, SEQ_LENGTH)
@settings(deadline=None, max_examples=300)
def test_concat_splits_the_stream_of_all_documents_into_samples(lengths, seq_length):
    samples = concat(lengths, seq_length)
    assert len(samples) == lengths.sum() // seq_length
    stream = [
        (document, position)
        for document, length in enumerate(lengths)
        for position in range(length)
    ]
    placed = [
        (document, start + offset)
        for sample in samples
        for document, start, count in sample
        for offset in range(count)
    ]
    assert placed == stream[: len(samples) * seq_length]
    assert all(count > 0 for sample in samples for _, _, count in sample)


@given(LENGTHS, SEQ_LENGTH, st.integers(0, 5))
@settings(deadline=None, max_examples=300)
def test_best_fit_places_every_token_once_and_cuts_only_long_documents(lengths, seq_length, seed):
    samples = best_fit(lengths, seq_length, seed)
    assert all(0 < sum(count for _, _, count in sample) <= seq_length for sample in samples)
    pieces = pieces_by_document(samples)
    for document, length in enumerate(lengths):
        edges = [0, *(end for _, end in pieces.get(document, []))]
        assert edges[-1] == length
        assert all(start == edge for (start, _), edge in zip(pieces.get(document, []), edges))
        assert len(pieces.get(document, [])) == -(-length // seq_length)
    # No two samples are at most half full: they would have been one.
    assert len(samples) <= 2 * (lengths.sum() // seq_length) + 1


def test_without_packing_a_sample_has_one_document_or_a_piece_of_it():
    assert one_by_one(np.array([3, 0, 9, 4]), 4) == [
        [(0, 0, 3)],
        [(2, 0, 4)],
        [(2, 4, 4)],
        [(2, 8, 1)],
        [(3, 0, 4)],
    ]


def test_best_fit_combines_documents_that_fill_a_sample_exactly():
    samples = best_fit(np.array([7, 5, 3, 6, 4, 5]), 10, 0)
    assert sorted(sorted(count for _, _, count in sample) for sample in samples) == [
        [3, 7],
        [4, 6],
        [5, 5],
    ]


def test_samples_are_shuffled_by_the_seed():
    lengths = np.arange(1, 200)
    first, repeated, other = (best_fit(lengths, 200, seed) for seed in (1, 1, 2))
    assert first == repeated
    assert first != other
    assert sorted(first) == sorted(other)


def bucket_of(lengths: list[int]):
    """Return a bucket of documents with these lengths, in order of priority."""
    from retemper.tokenize.spool import RECORD, Bucket

    records = np.zeros(len(lengths), RECORD)
    records["length"] = lengths
    none = np.zeros(len(lengths), int)
    return Bucket(
        records, numbers=none, near=none, ids=[], piece=none, duplicates=0, near_duplicates=[]
    )


def test_budget_ends_before_the_first_document_that_does_not_fit(workspace):
    """Check that a long document does not displace one of higher priority.

    Packing places the pieces of long documents first, so the budget must be applied before it.
    """
    from conftest import data_config

    from retemper.tokenize.select import _within
    from retemper.tokenize.write_shards import pack

    lengths = [10, 20, 12, 150, 9, 8, 7]
    data = data_config(workspace, "budget", seq_length=64, packing="best_fit")
    assert _within(bucket_of(lengths), data, 0, 2) == (3, 1, False)
    assert {
        document for pieces in pack(bucket_of(lengths), data, 0, 3)[1] for document, _, _ in pieces
    } == {0, 1, 2}
    assert _within(bucket_of(lengths), data, 0, 4) == (7, 4, True)
    assert _within(bucket_of([150, 10]), data, 0, 2) == (0, 0, False)


@given(LENGTHS.filter(len), SEQ_LENGTH, st.integers(0, 30), st.sampled_from(["best_fit", "none"]))
@settings(deadline=None, max_examples=200)
def test_budget_is_filled_and_never_exceeded(
    workspace, lengths, seq_length, sample_budget, packing
):
    from conftest import data_config

    from retemper.tokenize.select import _within
    from retemper.tokenize.write_shards import pack

    data = data_config(workspace, "budget", seq_length=seq_length, packing=packing)
    documents, samples, is_all = _within(bucket_of(lengths.tolist()), data, 0, sample_budget)
    assert samples == len(pack(bucket_of(lengths.tolist()), data, 0, documents)[1]) <= sample_budget
    assert is_all == (documents == len(lengths))
    if not is_all:
        assert len(pack(bucket_of(lengths.tolist()), data, 0, documents + 1)[1]) > sample_budget
