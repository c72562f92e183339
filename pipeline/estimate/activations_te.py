"""Activations of a rank on a GPU: what Transformer Engine's layers keep and work with.

By arithmetic alone: counted by reading Transformer Engine 2.19 (module/layernorm_linear.py,
module/linear.py and attention/dot_product_attention/ of its PyTorch code), and held to measured
peaks by tests/unit/test_memory.py.
"""

import math

from retemper.pipeline.estimate.activations import SHARDED_BY_INPUT, Activations
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.shapes import linear_layers

# cuBLAS's on Hopper: 32 MiB of Transformer Engine's (cpp_extensions/gemm.py), as many of torch's.
_WORKSPACES = 64 * 2**20
# Bytes of a number in FP8, its share of a scale included.
_FP8_BYTES = {"delayed": 1, "tensorwise": 1, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32}
# model/adapted.py's: below this rank B of several adapters is a copy in blocks.
APART_FROM_RANK = 64


def layers_in_bf16(config: ModelSetup, stage: int) -> int:
    """How many layers of a pipeline stage an 8-bit precision leaves in bf16."""
    last = config.parallel.pipeline_parallel_size - 1
    return config.fp8.bf16_layers * ((stage == 0) + (stage == last))


class TransformerEngineActivations(Activations):
    """What one rank keeps of a micro-batch, and works with, in bytes; sizes as in Activations."""

    def __init__(self, config: Config, micro_batch_size: int):
        super().__init__(config, micro_batch_size)
        self.micro_batch_size = micro_batch_size
        self.fused_adapters = config.fused_adapters
        self.fp8 = _FP8_BYTES[config.fp8_recipe] if config.fp8_recipe else None

    def of_layer(self, stage: int) -> tuple[int, int]:
        """(kept of a layer for the backward pass, computed again in it), a mean over the stage."""
        layers = self.config.model.num_layers // self.config.parallel.pipeline_parallel_size
        in_bf16 = layers_in_bf16(self.config, stage)
        of_bf16 = TransformerEngineActivations(self.config, self.micro_batch_size)
        of_bf16.fp8 = None
        pairs = zip(of_bf16._of_equal_layers(), self._of_equal_layers(), strict=True)
        kept, again = ((in_bf16 * a + (layers - in_bf16) * b) // layers for a, b in pairs)
        return kept, again

    def _of_equal_layers(self) -> tuple[int, int]:
        hidden = self.own * self.h * self.element
        attention = self.attention()
        ffn = self.norm("gate", "up") + self.feed_forward()
        # The norm is a part of the layer that is computed again, unless it stands apart from it:
        # then that layer's input is kept beside the norm's.
        apart = self.fused_adapters and self.adapted
        from_here = 2 * hidden if apart else hidden
        return {
            "none": (attention + ffn, 0),
            "selective": (attention + from_here, ffn - from_here),
            "full": (hidden, attention + ffn - hidden),
        }[self.config.parallel.recompute]

    def constant(self, stage: int) -> int:
        """What is held beside, however many micro-batches wait."""
        held = _WORKSPACES
        if self.full:
            # In the place of gradients that are summed in float32 already autograd is given an
            # unused tensor, one for each shape (module/base.py, get_dummy_wgrad).
            sizes = linear_layers(self.config.model).values()
            tp = self.config.parallel.tensor_parallel_size
            held += sum(math.prod(size) for size in sizes) // tp * self.element
        if self.fused_adapters:
            layers = self.config.model.num_layers // self.config.parallel.pipeline_parallel_size
            held += layers * sum(self._joined(parts) for parts in (("q", "k", "v"), ("gate", "up")))
        return held

    def _joined(self, parts: tuple[str, ...]) -> int:
        """Joined copies of a layer's factors, and sums of their gradients (model/adapted.py)."""
        adapted = [part for part in parts if part in self.lora.targets]
        rank = len(adapted) * self.lora.rank
        elements = rank * self.h
        if self.lora.rank < APART_FROM_RANK:
            elements += rank * sum(self.features[part][1] for part in parts)
        return elements * (self.element + 4)

    def in_fp8(self, elements: int) -> int:
        """Bytes of a copy in FP8; of none where a layer is not computed in it."""
        return round(elements * self.fp8) if self.fp8 else 0

    def norm(self, *targets: str) -> int:
        """RMSNorm, of which the layers `targets` read: its input, a number a token, its output."""
        elements = self.own * self.h
        return elements * self.element + self.own * 4 + self.input_of(targets, elements)

    def input_of(self, targets: tuple[str, ...], elements: int) -> int:
        """What a layer of these parts keeps of what it reads, a layer with adapters theirs too."""
        if self.full:  # for the weight's gradient, as it was multiplied
            quantized = self.fp8 and "head" not in targets
            return self.in_fp8(elements) if quantized else elements * self.element
        adapted = [target for target in targets if target in self.lora.targets]
        if not adapted:
            return 0
        kept = elements * self.element
        if self.lora.dropout:
            kept += elements  # beside what dropout leaves its mask
        if not self.fused_adapters and targets[0] not in SHARDED_BY_INPUT:
            kept += self._beside_returned_norm(elements)
        return kept + self.adapters(adapted, targets)

    def _beside_returned_norm(self, elements: int) -> int:
        """What a layer with its norm inside keeps of the norm's output where it gives that out.

        A copy in FP8; in bf16 that output itself (layernorm_linear.py, ln_out_to_save), which is
        the adapters' input too unless dropout makes another.
        """
        if self.fp8:
            return self.in_fp8(elements)
        return elements * self.element if self.lora.dropout else 0

    def adapters(self, adapted: list[str], parts: tuple[str, ...]) -> int:
        """What adapters keep beside a layer's input: fused ones their hidden states alone."""
        if not self.fused_adapters:
            return super().adapters(adapted, parts)
        tokens = self.own if parts[0] in SHARDED_BY_INPUT else self.tokens
        return tokens * len(adapted) * self.lora.rank * self.element

    def attention(self) -> int:
        """From the norm before it to its output, which o reads."""
        kept = self.norm("q", "k", "v") + self._core_attention() + self._input_of_o()
        kept += self.tokens * self.heads * 4  # logarithms of the softmax's sums
        if self.config.model.qk_norm:  # what these norms read, and a number a head
            read = self.q + self.k
            kept += self.tokens * (read * self.element + read // self.config.model.kv_channels * 4)
        if self.element == 4:  # no fused kernel takes float32: the scores' softmax is kept
            kept += self.heads * self.micro_batch_size * self.sequence**2 * 4
        return kept

    def _core_attention(self) -> int:
        """Queries, keys and values, rotated, and the output; in FP8 with fp8.attention.

        Of that output, with scales of this step, bf16 is kept (backends.py, FusedAttnFunc).
        """
        read = self.tokens * (self.q + 2 * self.k)
        output = self.tokens * self.q
        if not (self.config.fp8.attention and self.fp8):
            return (read + output) * self.element
        kept = output * self.element if self._keeps_output() else self.in_fp8(output)
        return self.in_fp8(read) + kept

    def _keeps_output(self) -> bool:
        """Whether attention keeps its output as o reads it."""
        return not (self.config.fp8.attention and self.config.fp8_recipe == "delayed")

    def _input_of_o(self) -> int:
        """What o keeps beyond what attention keeps already."""
        elements = self.tokens * self.q
        kept = self.input_of(("o",), elements)
        of_its_own = self.fp8 if self.full else self.lora.dropout
        shared = kept and self._keeps_output() and not of_its_own
        return kept - (elements * self.element if shared else 0)

    def feed_forward(self) -> int:
        """gate and up, from which SwiGLU's backward pass computes, and their product for down."""
        product = self.tokens * self.f
        return 2 * product * self.element + self.input_of(("down",), product)

    def forward(self) -> int:
        """Of plain adapters on gate and up, beyond what is kept once the layer is done.

        The base's output and what is added to it, while their sum's product is not there yet.
        """
        if not self.adapted or self.fused_adapters:
            return 0
        return (3 if self.reads_product else 4) * self.tokens * self.f * self.element

    def backward(self) -> int:
        """Of one layer, beyond what is kept, the most of three moments.

        In SwiGLU the gradients of its output and of its two factors. In the layer of gate and up
        the gradients of its input and, in FP8 beside bf16, of its output, with a frozen weight's
        other order; gate and up are gone. From both what down kept of its input is gone too. In
        attention the gradients of its output, of queries, keys and values, and a sum of that of
        queries in float32, when all that the feed-forward layer kept is gone.
        """
        hidden = self.own * self.h * self.element
        product = self.tokens * self.f
        gone = self.input_of(("down",), product)
        swiglu = 3 * product * self.element - gone
        column = hidden + self._orders_of_gradient() * self.in_fp8(2 * product) - gone
        if not self.full and self.fp8 and not self.config.fp8.keep_transposed:
            column += self.in_fp8(2 * self.h * self.f)
        attention = self.tokens * (2 * (self.q + self.k) * self.element + self.q * 4)
        if self.context > 1:
            attention += self._ring()
        attention -= self.norm("gate", "up") + self.feed_forward()
        return hidden + max(swiglu, column, attention)

    def _orders_of_gradient(self) -> int:
        """In how many orders the gradient of gate and up is cast to FP8.

        A layer with its norm inside casts to both, whatever trains (layernorm_linear.py).
        """
        return 1 if self.fused_adapters and self.adapted else 2

    def _ring(self) -> int:
        """Other context-parallel ranks' keys and values, and gradients: one sent, one received."""
        return 4 * self.tokens * 2 * self.k * self.element

    def scoring(self, stage: int) -> int:
        """Of a forward pass that nothing follows.

        Hidden states with logits, or with gate, up and their product; of adapters on gate and up
        the base's output, what is added to it, and the sum.
        """
        logits = 0
        if stage == self.config.parallel.pipeline_parallel_size - 1:
            of_all = self.tokens * (4 if self.element == 4 else 6)
            logits = of_all if self.full else self.of_piece() * self.element
        gates = (6 if self.adapted else 3) * self.tokens * self.f * self.element
        return 4 * self.own * self.h * self.element + max(logits * self.vocabulary, gates)

    def loss_by_pieces(self) -> int:
        """Of a frozen head: a piece's logits and their softmax, with hidden states and their gradient.

        What is in float32 between them stays in the registers of a compiled kernel.
        """
        hidden = self.tokens * self.h
        gathered = hidden if self.config.parallel.sequence_parallel else 0
        logits = 2 * self.of_piece() * self.vocabulary
        return (self.own * self.h + gathered + hidden + logits) * self.element
