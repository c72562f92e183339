"""Model FLOPs, for MFU as PaLM defines it (arXiv 2204.02311, appendix B).

Matrix multiplications are counted, with two operations for each multiplication and addition: those
of the linear layers, of attention (its causal half) and of the output head, without the padding of
the vocabulary. Not counted are the embedding, which is a lookup; norms, softmax, rotary embeddings
and activation functions; and the work of an implementation beyond the model, like recomputation of
activations or DoRA's row norms. The part of attention that is masked between packed documents is
counted as if a sample were one document.
"""

from retemper.pipeline.schema.model import LoraConfig, ModelConfig
from retemper.pipeline.schema.shapes import linear_layers


def flops_per_token(model: ModelConfig, lora: LoraConfig | None, seq_length: int) -> int:
    """Return the model FLOPs per token of training, forward and backward.

    Each multiplication is done once forward, once for the gradient of its input and once for the
    gradient of its weight. A frozen weight needs no gradient, nor does an input without trainable
    parameters before it: so a frozen layer is counted twice, an adapter three times, and the layers
    before the first adapter once.

    Args:
        model: its shape.
        lora: None for full training.
        seq_length: tokens per sample.
    """
    first = _layer(model, lora, seq_length, trains_before=lora is None)
    others = _layer(model, lora, seq_length, trains_before=True) * (model.num_layers - 1)
    head = 2 * model.hidden_size * model.vocab_size * (2 if lora else 3)
    return first + others + head


# Linear layers grouped by their common input.
_INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def _layer(
    model: ModelConfig, lora: LoraConfig | None, seq_length: int, *, trains_before: bool
) -> int:
    """Return the model FLOPs per token of one layer.

    trains_before: whether there are trainable parameters before this layer.
    """
    sizes = linear_layers(model)
    flops = 0
    for names in _INPUTS:
        for name in names:
            features_in, features_out = sizes[name]
            flops += 2 * features_in * features_out * (1 + trains_before + (lora is None))
            if lora and name in lora.targets:
                flops += 2 * lora.rank * (features_in * (2 + trains_before) + features_out * 3)
        trains_before = trains_before or bool(lora and set(names) & set(lora.targets))
        if names[0] == "q":
            # Attention follows: the causal halves of QK^T and of the product with V.
            # Each of the two has two inputs.
            flops += (
                2
                * seq_length
                * model.kv_channels
                * model.num_attention_heads
                * (1 + 2 * trains_before)
            )
    return flops
