"""Test the order of training samples.

It is a pure function, equal on every rank and after every restart, and each rank reads few shards.
"""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from conftest import overrides
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.data.order import LANES, ORDER_VERSION, Order, Stream
from retemper.pipeline.data.reader import TrainingBatches
from retemper.pipeline.distributed.topology import Topology

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


def ids_of_epoch(stream: Stream, epoch: int, batch_size: int = 7) -> np.ndarray:
    order = Order((stream,))
    total = stream.samples
    first = epoch * total
    return np.concatenate(
        [
            order.batch(first + done, min(batch_size, total - done))
            for done in range(0, total, batch_size)
        ]
    )


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**63 - 1), st.integers(0, 5), st.integers(1, 50))
def test_every_epoch_contains_every_sample_once(sizes, seed, epoch, batch_size):
    stream = Stream(seed, sizes, 1)
    assert (np.sort(ids_of_epoch(stream, epoch, batch_size)) == np.arange(stream.samples)).all()


def test_order_differs_between_epochs_and_between_seeds():
    orders = [
        ids_of_epoch(Stream(seed, (20, 20, 20), 1), epoch).tolist()
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(60)) not in orders


@settings(deadline=None)
@given(
    SIZES, SIZES, st.integers(1, 30), st.integers(0, 300), st.integers(1, 40), st.integers(1, 40)
)
def test_samples_read_do_not_depend_on_the_batch_size(first, second, share, start, one, other):
    order = Order((Stream(1, first, 31 - share), Stream(2, second, share)))
    total = one * other
    for size in (one, other):
        parts = [order.batch(start + done, size) for done in range(0, total, size)]
        assert np.array_equal(np.sort(np.concatenate(parts)), np.sort(order.batch(start, total)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 500))
def test_mixture_fractions_are_exact_over_any_window(shares, start):
    order = Order(tuple(Stream(number, (50, 30), share) for number, share in enumerate(shares)))
    found = np.bincount(order.batch(start, sum(shares)) // 80, minlength=len(shares))
    assert found.tolist() == shares
    after = order.epochs(sum(shares) * 3)
    assert after == pytest.approx([3 * share / 80 for share in shares])


def test_each_rank_reads_only_the_shards_of_its_lanes():
    stream = Stream(17, (1000,) * 64, 1)
    order = Order((stream,))
    batch_size = 256
    for data_parallel_size in (1, 2, 8):
        seen = [set() for _ in range(data_parallel_size)]
        shards_per_batch = []
        for consumed in range(0, stream.samples, batch_size):
            parts = np.split(order.batch(consumed, batch_size), data_parallel_size)
            shards = [set((part // 1000).tolist()) for part in parts]
            shards_per_batch.append(max(map(len, shards)))
            for rank, touched in enumerate(shards):
                seen[rank] |= touched
        # One rank reads each shard; two ranks read a shard on the boundary of two lanes.
        assert sum(map(len, seen)) <= 64 + 2 * LANES
        assert max(shards_per_batch) <= 5 * LANES / data_parallel_size


def test_order_of_existing_runs_is_unchanged():
    """Pin the ids: a change to them needs a new ORDER_VERSION.

    Otherwise a run that resumes in the middle of an epoch would repeat or miss samples.
    """
    order = Order((Stream(17, (8192,) * 20 + (77,), 95), Stream(18, (500, 20), 5)))
    ids = np.concatenate([order.batch(start, 512) for start in (0, 512, 10**6, 10**9)])
    assert ORDER_VERSION == 1
    assert (
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        == "4580128d7f1856b7e723ff4f59d73e2813618c5c179e48855f5ca5216a22e2bf"
    )


def topology_of(rank: int, sizes: tuple[int, int, int, int]) -> Topology:
    """Return the topology of a rank in a layout (TP, CP, DP, PP), in megatron's order of ranks."""
    tp, cp, dp, pp = sizes
    data_parallel_rank = rank // (tp * cp) % dp
    stage = rank // (tp * cp * dp)
    return Topology(
        rank,
        tp * cp * dp * pp,
        1,
        rank % tp,
        stage,
        rank // tp % cp,
        data_parallel_rank,
        dp,
        stage == 0,
        stage == pp - 1,
        torch.device("cpu"),
    )


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(
        st.sampled_from([1, 2]),
        st.sampled_from([1, 2]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([1, 2, 3]),
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2000),
    st.booleans(),
)
def test_replica_ranks_read_equal_ids_and_replicas_together_the_global_batch(
    workspace, sizes, micro_batch_size, consumed, replay
):
    mixed = (
        [f"data.replay.path={workspace / 'data' / 'math'}", "data.replay.fraction=0.25"]
        if replay
        else []
    )
    config = load_config(
        overrides(
            workspace,
            "order",
            "train.global_batch_size=16",
            f"train.micro_batch_size={micro_batch_size}",
            *mixed,
            corpus="code",
        )
    )
    order = Streams(config).order
    ids_by_replica: dict[int, list[np.ndarray]] = {}
    for rank in range(int(np.prod(sizes))):
        topology = topology_of(rank, sizes)
        with TrainingBatches(config, topology, consumed, 2) as batches:
            steps = [data for data, _ in zip(batches, range(2), strict=False)]
        ids_by_replica.setdefault(topology.data_parallel_rank, []).append(
            np.stack([data.ids for data in steps])
        )
        for data in steps:
            assert len(data.micro_batches) * micro_batch_size == len(data.ids)
            needs_tokens = topology.is_first_stage or topology.is_last_stage
            assert all(
                (batch.tokens_BT is not None) == needs_tokens for batch in data.micro_batches
            )
    assert all((ids == peers[0]).all() for peers in ids_by_replica.values() for ids in peers)
    for step in range(2):
        global_batch = np.concatenate(
            [peers[0][step] for _, peers in sorted(ids_by_replica.items())]
        )
        assert len(global_batch) == 16
        assert np.array_equal(np.sort(global_batch), np.sort(order.batch(consumed + 16 * step, 16)))


def test_batches_contain_the_tokens_of_their_ids(workspace):
    config = load_config(overrides(workspace, "order", "parallel=dp2", corpus="code"))
    streams = Streams(config)
    (shards,) = streams.shards.values()
    for rank in range(2):
        with TrainingBatches(config, topology_of(rank, (1, 1, 2, 1)), 80, 3) as batches:
            for data in itertools.islice(batches, 3):
                tokens = np.concatenate([batch.tokens_BT.numpy() for batch in data.micro_batches])
                assert (tokens == shards.samples(data.ids).tokens_NT).all()
