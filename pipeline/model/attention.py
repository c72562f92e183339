"""Causal attention through torch's fused kernel, for layers without Transformer Engine.

megatron-core's own DotProductAttention materialises the score matrix; NOTES.md has what that costs.
"""

import torch
from megatron.core.transformer import TransformerConfig


class SdpaAttention(torch.nn.Module):
    """megatron-core's core attention, as one call of scaled_dot_product_attention. Causal, within each sample.

    Shapes: S sequence, B batch, H query heads and G key/value heads of this rank, D head size.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_placement):
        super().__init__()
        self.dropout, self.softmax_scale = config.attention_dropout, softmax_scale

    def forward(self, query_SBHD, key_SBGD, value_SBGD, attention_mask=None, *, packed_seq_params=None, **_masks):
        """Returns (S, B, H·D). The mask is always causal; packed sequences need Transformer Engine."""
        assert attention_mask is None and packed_seq_params is None
        output_BHSD = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query_SBHD, key_SBGD, value_SBGD)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output_BHSD.permute(2, 0, 1, 3).flatten(2)
