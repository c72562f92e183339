"""Map megatron parameters to blocks of transformers tensors, for import, export and adapters.

Blocks are copied unchanged, without transposition or permutation: megatron-core and transformers
apply rotary embeddings in the same way.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from retemper.pipeline.schema.model import ModelConfig

Region = tuple[slice, ...]

# Within a layer: megatron's name -> transformers' name.
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_ROW_PARALLEL = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}

# The linear layers that can have adapters, by target.
LINEAR = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Block:
    """A block that a parameter of ours and a tensor of a transformers folder share.

    parameter[target_region] == tensor `name`[source_region].
    """

    name: str
    source_region: Region
    target_region: Region


@dataclass(frozen=True)
class Shard:
    """The tensor-parallel part `rank` of `size` of a model's parameters."""

    model: ModelConfig
    rank: int = 0
    size: int = 1

    def blocks(self, parameter: str, shape: torch.Size) -> list[Block]:
        """Return the blocks of a parameter; padding rows of the vocabulary are in none.

        Args:
            parameter: name, with a layer number that counts from the start of the model.
            shape: of the parameter on this rank.
        """
        if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
            is_embedding = parameter.startswith("embedding") or self.model.tie_embeddings
            return self._vocabulary(EMBEDDING if is_embedding else HEAD, shape[0])
        if parameter == "decoder.final_layernorm.weight":
            return [Block(FINAL_NORM, (slice(None),), (slice(None),))]
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
        assert match, parameter
        layer, name = match.groups()
        prefix = f"model.layers.{layer}."
        if name in _WHOLE:
            return [Block(prefix + _WHOLE[name], (slice(None),), (slice(None),))]
        if name in _ROW_PARALLEL:
            columns = slice(self.rank * shape[1], (self.rank + 1) * shape[1])
            return [
                Block(
                    prefix + _ROW_PARALLEL[name], (slice(None), columns), (slice(None), slice(None))
                )
            ]
        kind = name.rpartition(".")[2]
        if name.startswith("self_attention.linear_qkv."):
            return list(self._qkv(prefix, kind))
        assert name.startswith("mlp.linear_fc1."), name
        return list(self._gate_up(prefix, kind))

    def _vocabulary(self, name: str, rows: int) -> list[Block]:
        first = self.rank * rows
        count = min(rows, self.model.vocab_size - first)
        if count <= 0:
            return []
        return [Block(name, (slice(first, first + count),), (slice(0, count),))]

    def _qkv(self, prefix: str, kind: str) -> Iterator[Block]:
        """Yield the blocks of the joint projection of queries, keys and values.

        megatron interleaves by query group: (group, [its queries, one key, one value], head size).
        """
        groups = self.model.num_query_groups // self.size
        heads = (
            self.model.num_attention_heads // self.model.num_query_groups * self.model.kv_channels
        )
        target_row = 0
        for group in range(self.rank * groups, (self.rank + 1) * groups):
            for target, rows in (
                ("q", heads),
                ("k", self.model.kv_channels),
                ("v", self.model.kv_channels),
            ):
                yield Block(
                    f"{prefix}{LINEAR[target]}.{kind}",
                    (slice(group * rows, (group + 1) * rows),),
                    (slice(target_row, target_row + rows),),
                )
                target_row += rows

    def _gate_up(self, prefix: str, kind: str) -> Iterator[Block]:
        rows = self.model.ffn_hidden_size // self.size
        source_rows = slice(self.rank * rows, (self.rank + 1) * rows)
        for number, target in enumerate(("gate", "up")):
            yield Block(
                f"{prefix}{LINEAR[target]}.{kind}",
                (source_rows,),
                (slice(number * rows, (number + 1) * rows),),
            )


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every tensor of a transformers folder, in its order."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    q = model.num_attention_heads * head
    kv = model.num_query_groups * head
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        outputs = {"q": q, "k": kv, "v": kv, "gate": ffn, "up": ffn}
        shapes |= {
            f"{prefix}{LINEAR[target]}.weight": (rows, hidden) for target, rows in outputs.items()
        }
        shapes |= {
            f"{prefix}{LINEAR['o']}.weight": (hidden, q),
            f"{prefix}{LINEAR['down']}.weight": (hidden, ffn),
        }
        shapes |= {
            f"{prefix}{name}.weight": (hidden,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        if model.qkv_bias:
            shapes |= {
                f"{prefix}{LINEAR[target]}.bias": (outputs[target],) for target in ("q", "k", "v")
            }
        if model.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    shapes[FINAL_NORM] = (hidden,)
    return shapes if model.tie_embeddings else shapes | {HEAD: (model.vocab_size, hidden)}
