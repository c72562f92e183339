"""How much arithmetic a model asks for, and how much a GPU can do: model FLOPs, for MFU as PaLM defines it (arXiv 2204.02311, B).

Counted are matrix multiplications, two operations for each multiplication and addition: of the linear layers, of attention (its
causal half) and of the output head, without its padding. Not counted: the embedding, which is looked up; norms, softmax, rotations and
activations; and what an implementation does beyond the model, as computing activations again, DoRA's row norms, or the part of
attention that packed documents mask away, which is counted as if a sample were one document.
"""

from retemper.pipeline.schema.model import LoraConfig, ModelConfig
from retemper.pipeline.schema.shapes import linear_layers


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


def _layer(
    model: ModelConfig, lora: LoraConfig | None, seq_length: int, *, trains_before: bool
) -> int:
    """trains_before: whether something does before this layer, whose gradient passes through it."""
    sizes = linear_layers(model)
    flops = 0
    for names in _INPUTS:
        for name in names:
            features_in, features_out = sizes[name]
            flops += 2 * features_in * features_out * (1 + trains_before + (lora is None))
            if lora and name in lora.targets:
                flops += 2 * lora.rank * (features_in * (2 + trains_before) + features_out * 3)
        trains_before = trains_before or bool(lora and set(names) & set(lora.targets))
        if (
            names[0] == "q"
        ):  # attention follows: scores and their sum of values, half of both; each has two inputs
            flops += (
                2
                * seq_length
                * model.kv_channels
                * model.num_attention_heads
                * (1 + 2 * trains_before)
            )
    return flops
