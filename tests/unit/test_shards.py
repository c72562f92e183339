"""Test reading intact, damaged, slow and deleted shards from a disk and from an object store.

The result is either the right samples or an error that names the file.
"""

import hashlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_config, overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.corpus.manifest import find_manifest
from retemper.pipeline.data.reader import TrainingBatches
from retemper.pipeline.data.shards import BadShard, TokenShards
from retemper.pipeline.distributed.topology import Topology, _check_shared_memory
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store as stores
from retemper.pipeline.files.sealed import dump_sealed
from retemper.tokenize import job_folder
from retemper.tokenize.job import tokenize

REMOTE = "s3://corpora/faults"


@pytest.fixture(scope="module")
def client(store):
    import boto3

    return boto3.client("s3")


@pytest.fixture(scope="module")
def corpus(workspace, tmp_path_factory, client) -> Path:
    """Return a corpus of many small compressed shards; the store has a copy of it at REMOTE."""
    import email

    folder = tmp_path_factory.mktemp("faults") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_folder, "_BUCKET_BYTES", 25_000)
        source = {"kind": "text", "path": str(Path(email.__file__).parent), "glob": "**/*.py"}
        tokenize(
            data_config(
                workspace, "faults", path=str(folder), source=source, compression="zstd", tasks=1
            ),
            progress=False,
        )
    for name, content in files(folder).items():
        client.put_object(Bucket="corpora", Key=f"faults/{name}", Body=content)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content(path: str | Path, cache: Path | None = None) -> str:
    """Return a hash of all samples of the training split."""
    shards = TokenShards(path, "train", cache)
    return hashlib.sha256(shards.samples(np.arange(len(shards))).tokens_NT.tobytes()).hexdigest()


def damage(content: bytes, kind: str, rng: random.Random) -> bytes | None:
    if kind == "deleted":
        return None
    place = rng.randrange(len(content))
    return (
        content[:place]
        if kind == "cut off"
        else content[:place]
        + bytes([content[place] ^ 1 << rng.randrange(8)])
        + content[place + 1 :]
    )


def test_store_and_disk_give_equal_samples_and_the_cache_avoids_requests(corpus, tmp_path, store):
    assert content(REMOTE, tmp_path) == content(corpus, tmp_path / "unpacked") == content(corpus)
    assert not list(corpus.rglob("*.mds")), "a corpus is not written to"
    store.set("counted", of="shard")
    assert content(REMOTE, tmp_path) == content(corpus)
    assert not store.asked
    store.set(None)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_damage_is_repaired_or_reported_but_never_silent(corpus, tmp_path, client, count):
    """Damage random files in the store and in the cache: flip a bit, truncate or delete them.

    The result must be the right samples, or an error within a minute.
    """
    rng = random.Random(5)
    whole = files(corpus)
    right = content(corpus)
    outcomes = {}
    shards = [name for name in whole if name.startswith("train/") and ".mds" in name]
    assert len(shards) >= 8
    cache = tmp_path / "cache"
    for _number in range(count):
        kind = rng.choice(["flipped", "cut off", "deleted"])
        place = rng.choice(["store", "cached", "index"])
        content(REMOTE, cache)  # restores cached shards that the previous round damaged
        shard = rng.choice(shards)
        name = "train/index.json" if place == "index" else shard
        if place == "cached":
            victim = cache / shard.removesuffix(".zstd")
            damaged = damage(victim.read_bytes(), kind, rng)
            victim.unlink()
            if damaged is not None:
                victim.write_bytes(damaged)
        else:
            (cache / shard.removesuffix(".zstd")).unlink()
            damaged = damage(whole[name], kind, rng)
            client.delete_object(Bucket="corpora", Key=f"faults/{name}")
            if damaged is not None:
                client.put_object(Bucket="corpora", Key=f"faults/{name}", Body=damaged)
        started = time.monotonic()
        try:
            outcome = "right" if content(REMOTE, cache) == right else "SILENT"
        except UserError as error:
            outcome = "refused"
            assert name in str(error), error
        assert time.monotonic() - started < 60
        client.put_object(Bucket="corpora", Key=f"faults/{name}", Body=whole[name])
        outcomes.setdefault(place, []).append(outcome)
    print(
        "\n",
        {
            place: {outcome: found.count(outcome) for outcome in set(found)}
            for place, found in outcomes.items()
        },
    )
    assert set(outcomes["cached"]) == {"right"}
    assert set(outcomes["store"]) == set(outcomes["index"]) == {"refused"}


@pytest.mark.parametrize("kind", ["flipped", "cut off", "deleted"])
def test_damaged_shard_on_a_disk_is_named_and_not_removed(corpus, workspace, tmp_path, kind):
    local = copy_of(workspace / "data" / "code", tmp_path / "local")
    victim = next((local / "train").rglob("*.mds"))
    damaged = damage(victim.read_bytes(), kind, random.Random(1))
    victim.unlink()
    if damaged is not None:
        victim.write_bytes(damaged)
    with pytest.raises(BadShard, match=f"{victim} is missing or damaged.*and resume$"):
        content(local, tmp_path / "cache")
    assert victim.exists() == (kind != "deleted")


def test_reads_are_retried_until_the_store_recovers(corpus, tmp_path, store):
    right = content(corpus)
    for number, (fault, times) in enumerate([("fails", 2), ("breaks off", 1), ("slow", 3)]):
        store.set(fault, of="shard.", times=times)
        started = time.monotonic()
        assert content(REMOTE, tmp_path / str(number)) == right
        assert time.monotonic() - started > (1 if fault != "slow" else 0.2)
        assert store.asked >= times
    store.set(None)


@pytest.mark.parametrize("fault", ["fails", "breaks off"])
def test_store_that_does_not_recover_ends_the_run(corpus, tmp_path, store, monkeypatch, fault):
    monkeypatch.setattr(stores, "_PATIENCE_SECONDS", 2)
    store.set(fault, of="shard.")
    with pytest.raises(
        UserError,
        match=r"shard\.00000\.mds\.zstd could not be read for \d s "
        r".*goes on from the last checkpoint",
    ):
        content(REMOTE, tmp_path)
    store.set(None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["fails", "hangs", "breaks off"])
def test_store_that_does_not_recover_ends_the_run_within_a_minute(corpus, tmp_path, store, fault):
    store.set(fault, of="shard.")
    started = time.monotonic()
    with pytest.raises(UserError, match="could not be read"):
        content(REMOTE, tmp_path)
    seconds = time.monotonic() - started
    store.set(None)
    print(f"\n{fault}: {seconds:.0f} s")
    assert 15 < seconds < 60


def copy_of(corpus: Path, folder: Path) -> Path:
    for name, whole in files(corpus).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (
                {"raw_data": {"basename": name, "bytes": 1, "hashes": {"sha256": ""}}},
                "it names the shard",
            )
            for name in (
                "../../escape.mds",
                "/etc/passwd",
                "00000/../../x.mds",
                "a\\b.mds",
                "00000/shard.00000.mds/../x",
            )
        ),
        ({"column_encodings": ["bytes", "pkl", "bytes"]}, "a column .* of type pkl"),
        ({"samples": None}, "do not trust it"),
    ],
)
def test_malicious_index_is_refused_even_if_its_hash_is_right(corpus, tmp_path, change, message):
    forged = copy_of(corpus, tmp_path / "forged")
    index = json.loads((forged / "train" / "index.json").read_text())
    index["shards"][0] |= change
    (forged / "train" / "index.json").write_text(json.dumps(index))
    manifest = find_manifest(str(forged))
    manifest["files"]["train/index.json"] = hashlib.sha256(
        (forged / "train" / "index.json").read_bytes()
    ).hexdigest()
    (forged / "manifest.json").write_text(dump_sealed(manifest))
    with pytest.raises(
        UserError,
        match=f"not written by `retemper tokenize`, do not trust it: .*{message}"
        if "trust" not in message
        else message,
    ):
        TokenShards(forged, "train")


def test_damaged_manifest_is_refused(corpus, tmp_path):
    path = copy_of(corpus, tmp_path / "copied") / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        TokenShards(path.parent, "train")


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_too_small_for_the_cache_is_refused_before_any_download(workspace, corpus, small_disk):
    config = load_config(
        overrides(
            workspace,
            "small",
            f"data.path={corpus}",
            "data.name=faults",
            f"data.cache_dir={small_disk}",
        )
    )
    rank = Topology(0, 1, 1, 0, 0, 0, 0, 1, True, True, torch.device("cpu"))
    with pytest.raises(UserError, match=r"set data\.cache_dir to a larger disk"):
        TrainingBatches(config, rank, 0, 1)
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_too_little_shared_memory_is_refused_if_ranks_share_a_node(small_disk):
    _check_shared_memory(1, small_disk)
    with pytest.raises(
        UserError, match="8 ranks on one node need 512 MiB: start the container with --ipc=host"
    ):
        _check_shared_memory(8, small_disk)
