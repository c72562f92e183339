"""Causal attention through torch's fused kernel, for layers without Transformer Engine.

megatron-core's DotProductAttention materialises the score matrix; docs/dev/log.md lists its cost.
"""

from contextlib import nullcontext

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer import TransformerConfig


class SdpaAttention(torch.nn.Module):
    """Core attention of megatron-core's layers by torch's scaled_dot_product_attention.

    It is causal within each sample, or within each packed document.

    Shapes: S sequence (this rank's part under context parallelism), B batch, H query heads and G
    key/value heads of this rank, D head size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_placement,
    ):
        super().__init__()
        self.dropout = config.attention_dropout
        # Heads are distributed over tensor-parallel ranks, which drop different weights. With
        # sequence parallelism megatron-core has forked the random state around all layers.
        self.forks_random_state = self.dropout > 0 and not config.sequence_parallel
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query_SBHD,
        key_SBGD,
        value_SBGD,
        attention_mask=None,
        *,
        packed_seq_params=None,
        **_masks,
    ):
        """Return the attention output, (S, B, H·D).

        For packed documents, whose inputs have no B dimension, it is (S, H·D).
        """
        assert attention_mask is None
        random_state = get_cuda_rng_tracker().fork if self.forks_random_state else nullcontext
        with random_state():
            return self._attend_in_parts(query_SBHD, key_SBGD, value_SBGD, packed_seq_params)

    def _attend_in_parts(self, query_SBHD, key_SBGD, value_SBGD, packed_seq_params):
        """Attend within each document, or over the ranks that share a sequence, or at once."""
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            documents = zip(
                *(
                    tensor.unsqueeze(1).split(lengths)
                    for tensor in (query_SBHD, key_SBGD, value_SBGD)
                ),
                strict=True,
            )
            return torch.cat([self._attend(*document).squeeze(1) for document in documents])
        if self.context_group.size() > 1:
            return self._attend_in_context(query_SBHD, key_SBGD, value_SBGD)
        return self._attend(query_SBHD, key_SBGD, value_SBGD)

    def _attend_in_context(self, query_SBHD, key_SBGD, value_SBGD):
        """Attend from this rank's two chunks of queries to the keys before them.

        The keys and values of the whole sequence are gathered. Batch.shard_for_context_parallel
        defines which chunks of the sequence a rank has.
        """
        rank = self.context_group.rank()
        size = self.context_group.size()
        chunk_order = [
            2 * part if part < size else 2 * (2 * size - 1 - part) + 1 for part in range(2 * size)
        ]
        keys, values = (
            gather_from_sequence_parallel_region(tensor, group=self.context_group)
            .unflatten(0, (2 * size, -1))[chunk_order]
            .flatten(0, 1)
            for tensor in (key_SBGD, value_SBGD)
        )
        parts = zip((rank, 2 * size - 1 - rank), query_SBHD.chunk(2), strict=True)
        ends = [(query, (part + 1) * len(query)) for part, query in parts]
        return torch.cat([self._attend(query, keys[:end], values[:end]) for query, end in ends])

    def _attend(self, query_SBHD, key_SBGD, value_SBGD):
        """Return the attention output, (S, B, H·D), for queries at the end of the keys' range.

        The last query has the position of the last key.
        """
        queries = len(query_SBHD)
        keys = len(key_SBGD)
        is_square = queries == keys
        output_BHSD = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query_SBHD, key_SBGD, value_SBGD)),
            attn_mask=None
            if is_square
            else query_SBHD.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_square,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output_BHSD.permute(2, 0, 1, 3).flatten(2)
