"""Test the loss masks, position ids and attention of packed documents."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import overrides
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.batch import make_batches
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.errors import UserError


@st.composite
def pieces(draw, length: int = 24):
    """Draw (length, prompt length) of the pieces of documents of a sample; the rest is padding."""
    lengths = []
    remaining = length
    while remaining and (not lengths or draw(st.booleans())):
        lengths.append(draw(st.integers(1, remaining)))
        remaining -= lengths[-1]
    return [(piece, draw(st.integers(0, piece))) for piece in lengths]


@settings(deadline=None)
@given(st.lists(pieces(), min_size=1, max_size=5), st.integers(1, 5), st.booleans())
def test_masks_positions_and_document_edges_match_the_pieces(
    drawn, micro_batch_size, mask_documents
):
    total = 24
    samples = Samples(len(drawn), total)
    samples.tokens[:-1] = np.arange(len(drawn) * total)
    for row, found in enumerate(drawn):
        for column, values in zip(
            ("lengths", "prompt_lengths"), zip(*found, strict=True), strict=True
        ):
            samples.pieces[column][row] = np.array(values, np.uint32).tobytes()
    batches = make_batches(samples, micro_batch_size, mask_documents=mask_documents)
    parts = [drawn[row : row + micro_batch_size] for row in range(0, len(drawn), micro_batch_size)]
    for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        check_batch(batch, part, number * micro_batch_size * total, total, mask_documents)


def check_batch(batch, drawn, first_token, total, mask_documents):
    expected_mask = []
    expected_positions = []
    edges = [0]
    for found in drawn:
        counts = []
        positions = []
        for length, prompt in found:
            counts += [
                index >= prompt and not (mask_documents and index == 0) for index in range(length)
            ]
            positions += range(length)
            edges.append(edges[-1] + length)
        padding = total - len(counts)
        counts += [False] * padding
        positions += range(padding)
        edges += [edges[-1] + padding] if padding else []
        expected_mask += [*counts[1:], False]
        expected_positions += positions if mask_documents else range(total)
    assert batch.loss_mask_BT.flatten().tolist() == expected_mask
    assert batch.position_ids_BT.flatten().tolist() == expected_positions
    assert batch.tokens_BT.flatten().tolist() == list(
        range(first_token, first_token + len(drawn) * total)
    )
    counted = batch.loss_mask_BT.bool()
    assert (batch.labels_BT[counted] == batch.tokens_BT[counted] + 1).all()
    if mask_documents:
        assert batch.document_edges.tolist() == edges
        assert batch.shape == (1, total * len(drawn))
        assert batch.longest_document == int(np.diff(edges).max())
    else:
        assert batch.document_edges is None
        assert batch.shape == (len(drawn), total)


@pytest.mark.filterwarnings("ignore")  # of megatron-core's imports
def test_attention_over_packed_documents_matches_a_block_diagonal_mask():
    from megatron.core.packed_seq_params import PackedSeqParams

    from retemper.pipeline.model.attention import SdpaAttention

    torch.manual_seed(1)
    edges = torch.tensor([0, 5, 6, 19, 32], dtype=torch.int32)
    query, key, value = (torch.randn(32, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    # A context-parallel group of one rank.
    one_rank = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    attention = SdpaAttention(SimpleNamespace(attention_dropout=0.0), pg_collection=one_rank)
    got = attention(
        query,
        key,
        value,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges
        ),
    )
    document = torch.bucketize(torch.arange(32), edges[1:].long(), right=True)
    mask = (document[:, None] == document) & torch.ones(32, 32).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.repeat_interleave(2, 1).transpose(0, 1),
        value.repeat_interleave(2, 1).transpose(0, 1),
        attn_mask=mask,
    )
    torch.testing.assert_close(got, expected.transpose(0, 1).flatten(1))


def test_instruction_pairs_have_loss_on_the_response_only(workspace, pairs):
    tokenizer = Tokenizer(workspace / "data" / "tokenizer")
    shards = TokenShards(pairs, "train")
    answers = {
        json.loads(line)["answer"]
        for line in (workspace / "pairs" / "pairs.jsonl").read_text().splitlines()
    }
    for mask_documents in (False, True):
        [batch] = make_batches(shards.samples(np.arange(8)), 8, mask_documents=mask_documents)
        text = tokenizer.backend.decode(
            batch.labels_BT[batch.loss_mask_BT.bool()].tolist(), skip_special_tokens=False
        )
        *found, rest = text.split("<|endoftext|>")
        assert len(found) > 8
        assert rest == ""
        assert set(found) <= answers


def test_data_show_prints_the_samples_of_a_step_with_their_sources(workspace, pairs, capsys):
    changes = [f"data.path={pairs}", "data.name=pairs", "data.mask_documents=true"]
    config = load_config(overrides(workspace, "data-show", *changes))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    command = ["data", "show", str(config.run_dir), "--step"]
    assert main([*command, "3", "--samples", "2"]) == 0
    output = capsys.readouterr().out
    assert output.count("── step 3 · sample ") == 2
    assert "pairs.jsonl:" in output
    assert "⟦Write " in output
    assert "return" in output
    assert main([*command, "0"]) == 1
    assert "read from step 1 on" in capsys.readouterr().err
    assert main([*command, "3", f"data.path={pairs / 'moved'}"]) == 1
    assert f"{pairs / 'moved'}" in capsys.readouterr().err
    assert main([*command, "3", "seed=3"]) == 1
    assert "seed=3: cannot be overridden" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["data.replay.path=x", "data.replay.fraction=0.005"],
            "not a whole number of samples of data.mixture_window=100",
        ),
        (
            [
                "data.replay.path=x",
                "data.replay.fraction=0.5",
                "data.mixture.m.path=y",
                "data.mixture.m.fraction=0.5",
            ],
            "leave nothing",
        ),
        (["data.mixture.replay.path=y", "data.mixture.replay.fraction=0.5"], "that name is taken"),
        (["data.replay.path=x", "data.replay.fraction=0.05"], "x holds no token corpus"),
    ],
)
def test_impossible_mixtures_are_refused(workspace, change, message):
    from retemper.pipeline.data.streams import check_corpora

    with pytest.raises(UserError, match=message):
        check_corpora(load_config(overrides(workspace, "mixed", *change)))


def test_losses_of_streams_add_up_over_context_parallel_ranks():
    from retemper.pipeline.model.forward import _sums_by_stream

    samples = Samples(4, 8)
    samples.tokens[:-1] = np.arange(32)
    for row in range(4):
        samples.pieces["lengths"][row] = np.array([8], np.uint32).tobytes()
        samples.pieces["prompt_lengths"][row] = np.array([row], np.uint32).tobytes()
    [batch] = make_batches(samples, 4, mask_documents=False)
    batch = replace(batch, streams=3, stream_numbers=torch.tensor([2, 0, 2, 0]))
    # The loss of a position is the number of its label.
    whole = _sums_by_stream(batch.labels_BT.float(), batch)
    labels = {row: range(8 * row + max(row, 1), 8 * row + 8) for row in range(4)}
    expected = [
        [sum(sum(labels[row]) for row in rows), sum(len(labels[row]) for row in rows)]
        for rows in ([1, 3], [], [0, 2])
    ]
    assert whole.tolist() == expected
    parts = [batch.shard_for_context_parallel(rank, 2) for rank in range(2)]
    assert sum(_sums_by_stream(part.labels_BT.float(), part) for part in parts).equal(whole)
