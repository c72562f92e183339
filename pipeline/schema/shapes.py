"""The shapes of the linear layers of a model."""

from retemper.pipeline.schema.model import ModelConfig


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one transformer layer, in the order of the forward pass.

    The result maps LoRA's name of each layer to its number of input and output features.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.kv_channels * model.num_attention_heads
    keys = model.kv_channels * model.num_query_groups
    return {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, ffn),
        "up": (hidden, ffn),
        "down": (ffn, hidden),
    }
