"""How much arithmetic a model asks for, and how much a GPU can do: model FLOPs, for MFU as PaLM defines it (arXiv 2204.02311, B).

Counted are matrix multiplications, two operations for each multiplication and addition: of the linear layers, of attention (its
causal half) and of the output head, without its padding. Not counted: the embedding, which is looked up; norms, softmax, rotations and
activations; and what an implementation does beyond the model, as computing activations again, DoRA's row norms, or the part of
attention that packed documents mask away, which is counted as if a sample were one document.
"""

from retemper.pipeline.schema.model import LoraConfig, ModelConfig

# Dense FLOP/s of a tensor core by the name that CUDA reports, first match first; where NVIDIA prints a figure with sparsity, half of it.
# https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100: SXM, PCIe, NVL),
# https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446 (H200),
# https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf (A100).
_PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12},
    "H200 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12},
    "A100": {"bf16": 312e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12},
}


def peak_flops(gpu: str | None, precision: str) -> float | None:
    """FLOP/s that a GPU of this name has at a precision; None where that is not known, or where there is no GPU.

    In FP8 those of FP8, though attention and the output head are computed in bf16 there.
    """
    known = next((peaks for name, peaks in _PEAKS.items() if gpu and name in gpu), {})
    return known.get(precision if precision in ("fp32", "bf16") else "fp8")


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer in the order of the forward pass, by LoRA's names: features in and out."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.kv_channels * model.num_attention_heads, model.kv_channels * model.num_query_groups
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, ffn),
        "up": (hidden, ffn),
        "down": (ffn, hidden),
    }


def flops_per_token(model: ModelConfig, lora: LoraConfig | None, seq_length: int) -> int:
    """Model FLOPs of training on one token of a sample of seq_length, forward and backward.

    Each multiplication is done once forward, once for the gradient of its input and once for that of its weight. Of a frozen
    weight there is no gradient, and of an input none where nothing before it trains: so a frozen layer is counted twice, an
    adapter three times, and the layers before the first adapter once.
    """
    first = _layer(model, lora, seq_length, trains_before=lora is None)
    others = _layer(model, lora, seq_length, trains_before=True) * (model.num_layers - 1)
    head = 2 * model.hidden_size * model.vocab_size * (2 if lora else 3)
    return first + others + head


# Layers that take the same input: what trains in one of them asks for no gradient of another's.
_INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def _layer(model: ModelConfig, lora: LoraConfig | None, seq_length: int, *, trains_before: bool) -> int:
    """trains_before: whether something does before this layer, whose gradient passes through it."""
    sizes, flops = linear_layers(model), 0
    for names in _INPUTS:
        for name in names:
            features_in, features_out = sizes[name]
            flops += 2 * features_in * features_out * (1 + trains_before + (lora is None))
            if lora and name in lora.targets:
                flops += 2 * lora.rank * (features_in * (2 + trains_before) + features_out * 3)
        trains_before = trains_before or bool(lora and set(names) & set(lora.targets))
        if names[0] == "q":  # attention follows: scores and their sum of values, half of both; each has two inputs
            flops += 2 * seq_length * model.kv_channels * model.num_attention_heads * (1 + 2 * trains_before)
    return flops
