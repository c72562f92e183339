"""Measure full training on one GPU of 140 GB, in whole steps of the training loop.

The model has Llama-2-7B's shape, the optimizer is Lion, and samples have 4096 tokens.

With 80 GB: --set model.num_layers=16.
"""

from gpu_machine import ROOT
from gpu_measure import Part, Steps
from gpu_parts import main

OUT = ROOT / "benchmarks" / "results" / "gpu-full.json"
STEPS = Steps(warm_up=1, timed=3)
SHORTEST = 35  # seconds: of a part that takes 5 steps of 16 × 4096 tokens, and builds its model

FULL = (
    "model=llama2_7b",
    "optimizer=lion",
    "optimizer.lr=1e-5",
    "train.global_batch_size=16",
    "train.micro_batch_size=1",
)


def parts() -> list[Part]:
    """Return the parts, the most important first."""
    asked = {
        "full-bf16-graph": ("precision=bf16", "train.cuda_graph=on"),
        "full-fp8_tensorwise-graph": ("precision=fp8_tensorwise", "train.cuda_graph=on"),
        "full-fp8_tensorwise-attention-graph": (
            "precision=fp8_tensorwise",
            "fp8.attention=true",
            "train.cuda_graph=on",
        ),
        # The float32 gradients, 27 GB, are read and written in half as many passes.
        "full-bf16-micro2": ("precision=bf16", "train.micro_batch_size=2"),
        "full-fp8_tensorwise-attention-micro2": (
            "precision=fp8_tensorwise",
            "fp8.attention=true",
            "fp8.param_gather=true",
            "train.micro_batch_size=2",
        ),
        "full-bf16-eager": ("precision=bf16", "train.cuda_graph=off"),
        "full-fp8_tensorwise-eager": ("precision=fp8_tensorwise", "train.cuda_graph=off"),
        "full-fp8_delayed": ("precision=fp8_delayed",),
    }
    return [Part(name, (*FULL, *overrides)) for name, overrides in asked.items()]


if __name__ == "__main__":
    main(__doc__, OUT, parts(), STEPS, SHORTEST)
