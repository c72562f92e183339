"""Causal attention through torch's fused kernel, for layers without Transformer Engine.

megatron-core's own DotProductAttention materialises the score matrix; NOTES.md has what that costs.
"""

import torch
from megatron.core.transformer import TransformerConfig


class SdpaAttention(torch.nn.Module):
    """megatron-core's core attention by scaled_dot_product_attention. Causal, within each sample or each packed document.

    Shapes: S sequence, B batch, H query heads and G key/value heads of this rank, D head size.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_placement):
        super().__init__()
        self.dropout, self.softmax_scale = config.attention_dropout, softmax_scale

    def forward(self, query_SBHD, key_SBGD, value_SBGD, attention_mask=None, *, packed_seq_params=None, **_masks):
        """Returns (S, B, H·D); of packed documents, which come without B, (S, H·D)."""
        assert attention_mask is None
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            documents = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query_SBHD, key_SBGD, value_SBGD)), strict=True)
            return torch.cat([self._attend(*document).squeeze(1) for document in documents])
        return self._attend(query_SBHD, key_SBGD, value_SBGD)

    def _attend(self, query_SBHD, key_SBGD, value_SBGD):
        output_BHSD = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query_SBHD, key_SBGD, value_SBGD)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output_BHSD.permute(2, 0, 1, 3).flatten(2)
