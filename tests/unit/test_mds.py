"""Test the reader of MDS shards against that of mosaicml-streaming, on shards it has written."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.data.mds import Samples, Shard, ShardFile


@st.composite
def corpora(draw):
    """Draw (dtype, samples as dictionaries) with pieces of documents, with or without prompts."""
    dtype = draw(st.sampled_from(["uint16", "uint32"]))
    seq_length = draw(st.integers(1, 9))
    columns = {"lengths": "<u4", "documents": "<u8"} | (
        {"prompt_lengths": "<u4"} if draw(st.booleans()) else {}
    )
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 4))
        values = {
            name: draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))
            for name in columns
        }
        tokens = draw(
            st.lists(st.integers(0, np.iinfo(dtype).max), min_size=seq_length, max_size=seq_length)
        )
        rows.append(
            {"tokens": np.array(tokens, dtype)}
            | {name: np.array(found, columns[name]) for name, found in values.items()}
        )
    return dtype, rows


@settings(deadline=None, max_examples=50)
@given(corpora(), st.randoms())
def test_samples_match_those_that_streaming_reads(tmp_path_factory, corpus, random):
    from streaming import MDSWriter
    from streaming.base.format import reader_from_json

    dtype, rows = corpus
    folder = tmp_path_factory.mktemp("mds")
    seq_length = len(rows[0]["tokens"])
    columns = {
        name: f"ndarray:{dtype}:{seq_length}" if name == "tokens" else "bytes" for name in rows[0]
    }
    with MDSWriter(columns=columns, out=str(folder / "00000"), hashes=["sha256"]) as writer:
        for row in rows:
            writer.write(
                {
                    name: value if name == "tokens" else value.tobytes()
                    for name, value in row.items()
                }
            )
    [entry] = json.loads((folder / "00000" / "index.json").read_text())["shards"]
    entry["raw_data"]["basename"] = "00000/" + entry["raw_data"]["basename"]
    reference = reader_from_json(str(folder), "", entry)
    shard = Shard.from_index(entry)
    numbers = random.sample(range(len(rows)), len(rows))
    read = Samples(len(rows), seq_length)
    with open(folder / shard.name, "rb", buffering=0) as file:
        ShardFile(shard, file).read(numbers, read, list(range(len(rows))))
    for row, number in enumerate(numbers):
        expected = reference[number]
        assert read.tokens_NT[row].tolist() == expected.pop("tokens").tolist()
        assert read.pieces["prompt_lengths"][row] == expected.pop(
            "prompt_lengths", bytes(len(expected["lengths"]))
        )
        assert {name: read.pieces[name][row] for name in expected} == expected
    assert read.tokens[-1] == 0


RAW = {"basename": "00000/shard.00000.mds", "bytes": 48, "hashes": {"sha256": ""}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "format mds, version 1"),
        (
            {"compression": "gz", "zip_data": {"basename": "00000/shard.00000.mds.zstd"}},
            "compressed by gz",
        ),
        (
            {"raw_data": RAW | {"basename": "../../shard.00000.mds"}},
            "names the shard '../../shard.00000.mds'",
        ),
        ({"zip_data": {"basename": "/etc/passwd"}}, "stored as '/etc/passwd'"),
        ({"column_encodings": ["pkl"]}, "column tokens of type pkl"),
        ({"samples": 0}, "a shard of 0 samples"),
        ({"samples": 2**40}, "a shard of 1099511627776 samples in 48 bytes"),
        ({"raw_data": RAW | {"hashes": {"sha1": ""}}}, "no sha256"),
    ],
)
def test_shards_that_tokenize_does_not_write_are_refused(change, message):
    entry = {"version": 2, "format": "mds", "compression": None, "zip_data": None, "samples": 3}
    entry |= {
        "raw_data": RAW,
        "column_names": ["tokens"],
        "column_encodings": ["ndarray:uint16:8"],
        "column_sizes": [16],
    }
    assert Shard.from_index(entry).samples == 3
    with pytest.raises(ValueError, match=message):
        Shard.from_index(entry | change)
