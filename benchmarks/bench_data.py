"""Measure the reader of training batches: throughput, restarts, ranks that share it, and waits.

    python benchmarks/bench_data.py [reader] [resume] [peers] [waits]

All parts run by default, which takes about five minutes.

- reader: samples/s beside streaming's own reader and a raw memmap: 32,768 samples of 4096 tokens on
  this disk, one process, interleaved.
- resume: the first batch far into 20B tokens, from an index whose shards are one and the same file.
- peers: two ranks that read the same micro-batch, or one that broadcasts it.
- waits: 100 steps of the demo's model, and every step's wait for data.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tiny import TINY

SEQ_LENGTH = 4096
SAMPLES_PER_SHARD = 64 if TINY else 8000
BATCH_SIZE = 16 if TINY else 512
ROUNDS = 1 if TINY else 5
STEPS = 2 if TINY else 12
PEER_STEPS = 22 if TINY else 220
TRAINING_TOKENS = 16384 if TINY else 409600


def main(parts: list[str]) -> None:
    benches = {
        "reader": bench_reader,
        "resume": bench_resume,
        "peers": bench_peers,
        "waits": bench_waits,
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in parts or benches:
            benches[part](Path(folder))


def synthetic_corpus(path: Path, shards: int) -> None:
    """Write a corpus in retemper's format to `path`.

    It is one shard of random tokens, in documents of a thousand tokens, under `shards` names.
    """
    import hashlib

    from streaming import MDSWriter

    from retemper.pipeline.corpus.manifest import READ_BY_TRAINING
    from retemper.pipeline.files.sealed import dump_sealed

    rng = np.random.default_rng(0)
    columns = {"tokens": f"ndarray:uint16:{SEQ_LENGTH}", "lengths": "bytes", "documents": "bytes"}
    lengths, documents = np.array([1024] * 4, "<u4").tobytes(), np.arange(4, dtype="<u8").tobytes()
    folder = path / "train" / "00000"
    with MDSWriter(
        columns=columns, out=str(folder), hashes=["sha256"], size_limit=1 << 30
    ) as writer:
        for _ in range(SAMPLES_PER_SHARD):
            tokens = rng.integers(0, 32000, SEQ_LENGTH, np.uint16)
            writer.write({"tokens": tokens, "lengths": lengths, "documents": documents})
    (shard,) = json.loads((folder / "index.json").read_text())["shards"]
    listed = []
    for number in range(shards):
        name = f"{number:05d}/shard.00000.mds"
        listed.append(shard | {"raw_data": shard["raw_data"] | {"basename": name}})
        if number:
            (path / "train" / f"{number:05d}").mkdir()
            os.link(folder / "shard.00000.mds", path / "train" / name)
    for split, found in (("train", listed), ("heldout", [])):
        (path / split).mkdir(exist_ok=True)
        (path / split / "index.json").write_text(json.dumps({"version": 2, "shards": found}))
    np.save(path / "token_bytes.npy", np.ones(32000, np.int32))
    manifest = {
        "name": "synthetic",
        "made_from": {},
        "fingerprint": "synthetic",
        "splits": {"train": {"samples": shards * SAMPLES_PER_SHARD}},
    }
    manifest |= {"vocab_size": 32000, "seq_length": SEQ_LENGTH, "tokenizer_sha256": ""}
    manifest["files"] = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in READ_BY_TRAINING
    }
    (path / "manifest.json").write_text(dump_sealed(manifest))


def config_of(path: Path):
    from retemper.pipeline.config.compose import load_config

    data = [
        f"data.path={path}",
        "data.name=synthetic",
        "data.tokenizer=none",
        "data.source.path=none",
        f"data.seq_length={SEQ_LENGTH}",
    ]
    train = [
        f"train.global_batch_size={BATCH_SIZE}",
        "train.micro_batch_size=8",
        "train.tokens=1T",
        "schedule.warmup_tokens=0",
        "optimizer.lr=1e-4",
    ]
    return load_config(
        [
            "study=bench",
            "name=bench",
            f"runs_dir={path.parent / 'runs'}",
            "model=llama2_7b",
            *data,
            *train,
        ]
    )


def one_rank():
    import torch

    from retemper.pipeline.distributed.topology import Topology

    return Topology(
        rank=0,
        world_size=1,
        local_world_size=1,
        tensor_parallel_rank=0,
        pipeline_parallel_rank=0,
        context_parallel_rank=0,
        data_parallel_rank=0,
        data_parallel_size=1,
        is_first_stage=True,
        is_last_stage=True,
        device=torch.device("cpu"),
    )


def bench_reader(folder: Path, rounds: int = ROUNDS, steps: int = STEPS) -> None:
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    from retemper.pipeline.data.open_streams import Streams
    from retemper.pipeline.data.reader import TrainingBatches

    path = folder / "reader"
    synthetic_corpus(path, shards=4)
    config = config_of(path)
    streams = Streams(config)
    (shards,) = streams.shards.values()
    shards.samples(np.arange(len(shards))).tokens_NT.astype(np.uint16).tofile(path / "tokens.bin")
    raw = np.memmap(path / "tokens.bin", np.uint16, "r").reshape(-1, SEQ_LENGTH)
    batches = iter(TrainingBatches(config, one_rank(), 0, 10**6))
    for _ in range(8):
        next(batches)  # shards opened

    def ours():
        for _ in range(steps):
            next(batches)

    def memmap():
        for step in range(steps):
            torch.from_numpy(
                raw[streams.order.batch(step * BATCH_SIZE, BATCH_SIZE)].astype(np.int64)
            )

    def streaming(workers):
        dataset = StreamingDataset(
            local=str(path / "train"), shuffle=True, batch_size=8, allow_unsafe_types=False
        )
        loader = iter(DataLoader(dataset, batch_size=8, num_workers=workers))
        for _ in range(BATCH_SIZE // 8):
            next(loader)

        def read():
            for _ in range(steps * BATCH_SIZE // 8):
                batch = next(loader)
            assert batch["tokens"].shape == (8, SEQ_LENGTH)

        return read

    def rate(read) -> float:
        started = time.perf_counter()
        read()
        return steps * BATCH_SIZE / (time.perf_counter() - started)

    rates: dict[str, list[float]] = {
        "retemper": [],
        "memmap": [],
        "streaming, 0 workers": [],
        "streaming, 2 workers": [],
    }
    for _ in range(rounds):
        for name, read in (("retemper", ours), ("memmap", memmap)):
            rates[name].append(rate(read))
        for workers in (0, 2):
            rates[f"streaming, {workers} workers"].append(rate(streaming(workers)))
    median = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(
            f"reader  {name:22} {median[name]:9,.0f} samples/s  "
            f"(rounds {min(found):,.0f} to {max(found):,.0f}); "
            f"retemper / it {median['retemper'] / median[name]:.2f}"
        )


FIRST_BATCH = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_data import config_of, one_rank
from retemper.pipeline.data.reader import TrainingBatches
config, rank = config_of(Path(sys.argv[2])), one_rank()
started = time.perf_counter()
next(TrainingBatches(config, rank, int(sys.argv[3]), 10))
print(time.perf_counter() - started, \
int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024)
import os; os._exit(0)
"""


def bench_resume(folder: Path) -> None:
    path = folder / "resume"
    synthetic_corpus(path, shards=611)  # 20.02B tokens
    for consumed in (0, 10**7):
        command = [
            sys.executable,
            "-c",
            FIRST_BATCH,
            str(Path(__file__).parent),
            str(path),
            str(consumed),
        ]
        seconds, peak = map(
            float,
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(),
        )
        print(
            f"resume  first batch of {BATCH_SIZE} at sample {consumed:>10,}: {seconds:.1f} s, "
            f"{peak:,.0f} MiB at most"
        )


PEERS = """
import sys, time, statistics
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
import torch.distributed as dist
from bench_data import PEER_STEPS, SEQ_LENGTH
from retemper.pipeline.data.batch import make_batches
from retemper.pipeline.data.shards import TokenShards
dist.init_process_group("gloo")
torch.set_num_threads(1)
shards, rank, times = TokenShards(sys.argv[2], "train"), dist.get_rank(), \
{"read": [], "broadcast": []}
batch = lambda ids: make_batches(shards.samples(ids), 8, mask_documents=False)[0]
for step in range(PEER_STEPS):
    ids = np.random.default_rng(step).integers(0, len(shards), 8)
    for way in times:
        dist.barrier()
        started = time.perf_counter()
        if way == "read" or rank == 0:
            found = batch(ids)
            tokens, mask = found.tokens_BT, found.loss_mask_BT
        else:
            tokens, mask = torch.empty(8, SEQ_LENGTH, dtype=torch.int64), torch.empty(8, SEQ_LENGTH)
        if way == "broadcast":
            dist.broadcast(tokens, 0)
            dist.broadcast(mask, 0)
        dist.barrier()
        times[way].append(time.perf_counter() - started)
if rank == 0:
    print(*(1000 * statistics.median(found[20:]) for found in times.values()))
"""


def bench_peers(folder: Path) -> None:
    path = folder / "peers"
    synthetic_corpus(path, shards=1)
    (folder / "peers.py").write_text(PEERS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(folder / "peers.py"),
    ]
    result = subprocess.run(
        [*command, str(Path(__file__).parent), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    read, broadcast = map(float, result.stdout.split())
    print(
        f"peers   micro-batch of 8 on two ranks: read by both {read:.2f} ms, "
        f"read by one and broadcast {broadcast:.2f} ms (with barriers)"
    )


def bench_waits(folder: Path) -> None:
    from retemper.pipeline.config.compose import load_config
    from retemper.pipeline.runs import run_folder
    from retemper.pipeline.study.demo import _prepare_data

    overrides = [
        "run=demo_base",
        f"runs_dir={folder / 'waits'}",
        "parallel=single",
        "track.wandb=off",
        "train.log_every_steps=1",
    ]
    overrides += [
        f"train.tokens={TRAINING_TOKENS}",
        "schedule.warmup_tokens=0",
        "evals.heldout={}",
        "checkpoint.milestones=[]",
    ]
    config = load_config(overrides)
    _prepare_data([config, load_config(["run=demo_full", f"runs_dir={folder / 'waits'}"])])
    subprocess.run(
        [sys.executable, "-m", "retemper.pipeline.cli", "train", *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    waits = sorted(
        record["data_wait_fraction"] for record in run_folder.read_metrics(config.run_dir)
    )
    late = waits[-max(1, len(waits) // 100)]
    print(
        f"waits   {len(waits)} steps: mean {statistics.mean(waits):.3%} of a step, "
        f"p99 {late:.3%}, worst {waits[-1]:.3%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
