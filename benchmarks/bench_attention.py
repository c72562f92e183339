"""Time a training step with torch's fused attention and with megatron-core's DotProductAttention.

    python benchmarks/bench_attention.py [key=value …]

The times are CPU-seconds on one rank, with interleaved runs. The default is the demo's model.
"""

import statistics
import sys
import time

import numpy as np
from tiny import TINY

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology

ROUNDS, STEPS = (1, 1) if TINY else (7, 3)


def main(overrides: list[str]) -> None:
    config = load_config(["run=demo_base", "parallel=single", *overrides])
    place = topology.start(config.parallel)
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from retemper.pipeline.checkpoint.state import TrainState
    from retemper.pipeline.data.batch import make_batches
    from retemper.pipeline.data.mds import Samples
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model import build
    from retemper.pipeline.model.graph import Passes
    from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
    from retemper.pipeline.train.step import train_step

    seed_step(config.seed, 0, place)
    runs = {}
    for name, attention in (("fused", build.SdpaAttention), ("megatron", DotProductAttention)):
        build.SdpaAttention = attention
        model = build.build_model(config, place)
        optimizer = build_optimizer(config, model)
        runs[name] = (
            TrainState(),
            Passes(config, model),
            optimizer,
            build_schedule(config, optimizer),
        )
    samples = Samples(config.train.global_batch_size, config.data.seq_length)
    samples.tokens[:-1] = np.random.default_rng(0).integers(
        0, config.model.vocab_size, len(samples.tokens) - 1
    )
    samples.pieces["lengths"] = [np.uint32(config.data.seq_length).tobytes()] * len(samples)
    samples.pieces["prompt_lengths"] = [np.uint32(0).tobytes()] * len(samples)
    batches = make_batches(samples, config.train.micro_batch_size, mask_documents=False)

    def seconds(name: str) -> float:
        started = time.process_time()
        losses.setdefault(name, []).extend(
            train_step(config, *runs[name], batches).loss for _ in range(STEPS)
        )
        return time.process_time() - started

    losses: dict[str, list[float]] = {}
    for name in runs:
        seconds(name)
    pairs = [(seconds("fused"), seconds("megatron")) for _ in range(ROUNDS)]
    ratios = sorted(megatron / fused for fused, megatron in pairs)
    np.testing.assert_allclose(losses["fused"], losses["megatron"], rtol=1e-4)
    print(
        f"CPU-seconds a step: fused {statistics.median(p[0] for p in pairs) / STEPS:.3f}, "
        f"megatron {statistics.median(p[1] for p in pairs) / STEPS:.3f}"
    )
    print(
        f"megatron / fused: median {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, "
        f"max {ratios[-1]:.2f}) over {ROUNDS} interleaved rounds; equal losses"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
