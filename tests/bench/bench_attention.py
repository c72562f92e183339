"""One training step with torch's fused attention against megatron-core's DotProductAttention, in CPU-seconds.

python tests/bench/bench_attention.py [key=value …]      (one rank; interleaved; default: the demo's model)
"""

import statistics
import sys
import time

import numpy as np

from retemper.pipeline.config import load_config
from retemper.pipeline.distributed import topology

ROUNDS, STEPS = 7, 3


def main(overrides: list[str]) -> None:
    config = load_config(["run=demo_base", "parallel=single", *overrides])
    place = topology.start(config.parallel)
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from retemper.pipeline.data.batch import make_batch
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model import build
    from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
    from retemper.pipeline.train.step import train_step

    seed_step(config.train.seed, 0, place)
    runs = {}
    for name, attention in (("fused", build.SdpaAttention), ("megatron", DotProductAttention)):
        build.SdpaAttention = attention
        model = build.build_model(config, place)
        optimizer = build_optimizer(config, model)
        runs[name] = (model, optimizer, build_schedule(config, optimizer))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_length))
    samples = [{"tokens": row, "lengths": np.array([len(row)])} for row in tokens]
    batches = [make_batch(samples, mask_documents=False)] * (config.train.global_batch_size // config.train.micro_batch_size)

    def seconds(name: str) -> float:
        started = time.process_time()
        losses.setdefault(name, []).extend(train_step(config, *runs[name], batches).loss for _ in range(STEPS))
        return time.process_time() - started

    losses: dict[str, list[float]] = {}
    for name in runs:
        seconds(name)
    pairs = [(seconds("fused"), seconds("megatron")) for _ in range(ROUNDS)]
    ratios = sorted(megatron / fused for fused, megatron in pairs)
    np.testing.assert_allclose(losses["fused"], losses["megatron"], rtol=1e-4)
    print(
        f"CPU-seconds a step: fused {statistics.median(p[0] for p in pairs) / STEPS:.3f}, megatron {statistics.median(p[1] for p in pairs) / STEPS:.3f}"
    )
    print(
        f"megatron / fused: median {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f}) over {ROUNDS} interleaved rounds; equal losses"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
