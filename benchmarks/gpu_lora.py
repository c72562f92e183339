"""Measure LoRA on one GPU, in whole steps of the training loop.

The model has Llama-2-7B's shape and random weights, and samples have 4096 tokens.

Each part by precision, kernel of the adapters (method.lora.kernel), with a CUDA graph or eager, and
size of its micro-batches. lora-nemo is the workload of NeMo 24.12's published 24,824 tokens/s a
GPU: short documents packed to 4096 tokens and masked, adapters on q, k and v alone, FP8
(docs.nvidia.com/nemo-framework/user-guide/24.12/nemotoolkit/performance/performance_summary.html);
its micro-batches are of two here.
"""

from gpu_machine import ROOT
from gpu_measure import Part, Steps
from gpu_parts import main

OUT = ROOT / "benchmarks" / "results" / "gpu-lora.json"
STEPS = Steps(warm_up=1, timed=3)
SHORTEST = 20  # seconds: of a part that takes 5 steps of 8 × 4096 tokens, and builds its model

LORA = (
    "model=llama2_7b",
    "method=lora",
    "init_from=unread",
    "optimizer.lr=1e-4",
    "train.global_batch_size=8",
)


def part(
    name: str,
    *,
    precision: str = "fp8_tensorwise",
    kernel: str = "fused",
    graph: str = "on",
    micro: int = 1,
    more=(),
    corpus="long",
) -> Part:
    """Return a part.

    Args:
        more: further overrides.
    """
    asked = (
        *LORA,
        f"precision={precision}",
        f"method.lora.kernel={kernel}",
        f"train.cuda_graph={graph}",
    )
    return Part(f"lora-{name}", (*asked, f"train.micro_batch_size={micro}", *more), corpus)


def parts() -> list[Part]:
    """Return the parts, the most important first."""
    paths = (("fused", "on"), ("plain", "off"), ("fused", "off"), ("plain", "on"))
    named = {"on": "graph", "off": "eager"}
    precisions = ("fp8_tensorwise", "bf16")
    all_parts = [
        part(
            f"{precision}-{kernel}-{named[graph]}", precision=precision, kernel=kernel, graph=graph
        )
        for precision in precisions
        for kernel, graph in paths
    ]
    all_parts += [
        part(f"{precision}-fused-graph-micro2", precision=precision, micro=2)
        for precision in precisions
    ]
    qkv = ("method.lora.targets=[q,k,v]", "data.mask_documents=true")
    all_parts.append(
        part("fp8_tensorwise-fused-graph-keep_transposed", more=("fp8.keep_transposed=true",))
    )
    all_parts.append(part("fp8_tensorwise-fused-graph-fp8_attention", more=("fp8.attention=true",)))
    fastest = ("fp8.keep_transposed=true", "fp8.attention=true")
    all_parts += [
        part("fp8_tensorwise-fused-graph-micro2-keep_transposed", micro=2, more=fastest[:1]),
        part("fp8_tensorwise-fused-graph-micro2-fastest", micro=2, more=fastest),
    ]
    all_parts.append(part("nemo", graph="off", micro=2, more=qkv, corpus="documents"))
    all_parts.append(part("fp8_tensorwise-fused-graph-swiglu", more=("parallel.recompute=swiglu",)))
    all_parts.append(part("fp8_tensorwise-fused-graph-rank256", more=("method.lora.rank=256",)))
    return all_parts


if __name__ == "__main__":
    main(__doc__, OUT, parts(), STEPS, SHORTEST)
