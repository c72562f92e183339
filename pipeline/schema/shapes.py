"""The matrices of a model's layers."""

from retemper.pipeline.schema.model import ModelConfig


def linear_layers(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer in the order of the forward pass, by LoRA's names: features in and out."""
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
