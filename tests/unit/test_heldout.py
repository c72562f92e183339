"""Test that held-out scores do not depend on the micro-batch size or on document masks.

Samples without a token to predict are refused.

A function replaces the model: its losses depend on the label, and on the token before the label or
on the position in the sample.
"""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import data_config, overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.shards import TokenShards
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.errors import UserError

prepare_megatron()  # before anything imports megatron-core
from retemper.pipeline.evals import heldout  # noqa: E402

SAMPLES = 11  # evals.max_samples of a tiny run: not a multiple of most micro-batch sizes


def scored(config, domain: str = "code", model=None):
    """Return the scores of a domain on one rank."""
    topology = SimpleNamespace(
        rank=0,
        data_parallel_size=1,
        data_parallel_rank=0,
        context_parallel_rank=0,
        device=torch.device("cpu"),
    )
    with (
        mock.patch.object(heldout, "run_schedule", model or losses),
        mock.patch.object(heldout, "all_reduce_from_last_stage", torch.Tensor.tolist),
    ):
        return heldout.heldout_scores(config, topology, torch.nn.Identity(), [domain])[domain]


def losses(_model, batches, *, forward_only):
    """Return losses that depend on the label and on the token before it."""
    return [
        {"losses_BT": (1 + batch.labels_BT * 0.01 + batch.tokens_BT * 0.003).float()}
        for batch in batches
    ]


def losses_by_position(_model, batches, *, forward_only):
    """Return losses that depend on the label and on its position."""
    return [
        {"losses_BT": (1 + batch.labels_BT * 0.01 + batch.position_ids_BT * 0.1).float()}
        for batch in batches
    ]


def config_of(workspace, *changes: str, micro_batch_size: int = 4):
    return load_config(
        overrides(workspace, "heldout", f"evals.micro_batch_size={micro_batch_size}", *changes)
    )


def assert_same(found, expected):
    assert found.scores.keys() == expected.scores.keys()
    for name, value in expected.scores.items():
        assert found.scores[name] == pytest.approx(value, rel=1e-12), name
    for one, other in zip(found.samples, expected.samples, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("corpus", ["code", "pairs"])
def test_scores_do_not_depend_on_the_micro_batch(workspace, pairs, corpus, mask_documents):
    path = {"code": workspace / "data" / "code", "pairs": pairs}[corpus]
    changes = [f"evals.heldout.code={path}", f"data.mask_documents={str(mask_documents).lower()}"]
    expected = scored(config_of(workspace, *changes, micro_batch_size=1))
    assert expected.scores["samples"] == SAMPLES
    assert expected.scores["stderr"] > 0
    assert len({record["bits"] for record in expected.samples}) == SAMPLES
    for size in (2, 4, SAMPLES, 64):
        assert_same(scored(config_of(workspace, *changes, micro_batch_size=size)), expected)


@pytest.fixture(scope="module")
def long_documents(workspace, tmp_path_factory) -> str:
    """Return the folder of a corpus whose documents are much longer than a sample.

    Each sample is a piece of one document, or padding.
    """
    import email
    from pathlib import Path

    from retemper.tokenize.job import tokenize

    folder = tmp_path_factory.mktemp("long")
    corpus = data_config(
        workspace,
        "long",
        documents=Path(email.__file__).parent,
        path=str(folder / "long"),
        packing="best_fit",
    )
    tokenize(corpus, progress=False)
    return corpus.path


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_document_masks_do_not_change_scores_of_samples_of_one_document(
    workspace, long_documents, micro_batch_size, monkeypatch
):
    class OneDocument(TokenShards):
        """The samples of the corpus, with the loss of those of several documents masked."""

        def samples(self, ids: np.ndarray) -> Samples:
            found = super().samples(ids)
            for row in range(len(found)):
                if len(found.values("lengths", row)) > 1:
                    found.mask_sample(row)
            return found

    monkeypatch.setattr(heldout, "TokenShards", OneDocument)
    changes = [f"evals.heldout.code={long_documents}", "evals.max_samples=40"]
    unmasked, masked = (
        scored(
            config_of(
                workspace,
                *changes,
                f"data.mask_documents={mask_documents}",
                micro_batch_size=micro_batch_size,
            ),
            model=losses_by_position,
        )
        for mask_documents in ("false", "true")
    )
    assert_same(masked, unmasked)
    assert masked.scores["tokens"] > 500


@pytest.mark.parametrize("mask_documents", ["false", "true"])
def test_samples_without_a_token_to_predict_are_refused(workspace, monkeypatch, mask_documents):
    class Prompts(TokenShards):
        """The samples of the corpus, each with a loss mask of zeros."""

        def samples(self, ids: np.ndarray) -> Samples:
            found = super().samples(ids)
            for row in range(len(found)):
                found.mask_sample(row)
            return found

    monkeypatch.setattr(heldout, "TokenShards", Prompts)
    message = (
        r"evals\.heldout\.code=.*/code: none of the 11 held-out samples .* has a token to predict"
    )
    with pytest.raises(UserError, match=message):
        scored(config_of(workspace, f"data.mask_documents={mask_documents}"))
