"""The activation memory of a rank on a GPU, with Transformer Engine's layers.

It is computed by arithmetic only, as derived from the PyTorch code of Transformer Engine 2.19
(module/layernorm_linear.py, module/linear.py and attention/dot_product_attention/), and is tested
against measured peaks in tests/unit/test_memory.py.
"""

import math

from retemper.pipeline.estimate.activations import SHARDED_BY_INPUT, Activations
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.shapes import linear_layers

# cuBLAS workspaces on Hopper: 32 MiB of Transformer Engine (cpp_extensions/gemm.py), 32 of torch.
_WORKSPACES = 64 * 2**20
# Bytes per element in FP8, including its share of a scale.
_FP8_BYTES = {"delayed": 1, "tensorwise": 1, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32}
# As in model/adapted.py: below this rank, the B of several adapters are copied into one matrix of
# blocks.
APART_FROM_RANK = 64


def layers_in_bf16(config: ModelSetup, stage: int) -> int:
    """Return how many layers of a pipeline stage remain in bf16 under an FP8 recipe."""
    last = config.parallel.pipeline_parallel_size - 1
    return config.fp8.bf16_layers * ((stage == 0) + (stage == last))


class TransformerEngineActivations(Activations):
    """The saved and the temporary activations of one micro-batch on one rank, in bytes.

    The names of sizes are those of Activations.
    """

    def __init__(self, config: Config, micro_batch_size: int):
        super().__init__(config, micro_batch_size)
        self.micro_batch_size = micro_batch_size
        self.fused_adapters = config.fused_adapters
        self.fp8 = _FP8_BYTES[config.fp8_recipe] if config.fp8_recipe else None

    def of_layer(self, stage: int) -> tuple[int, int]:
        """Return (saved for the backward pass, recomputed in it) of an average layer of a stage."""
        layers = self.config.model.num_layers // self.config.parallel.pipeline_parallel_size
        in_bf16 = layers_in_bf16(self.config, stage)
        bf16 = TransformerEngineActivations(self.config, self.micro_batch_size)
        bf16.fp8 = None
        pairs = zip(bf16._uniform_layer(), self._uniform_layer(), strict=True)
        kept, again = ((in_bf16 * a + (layers - in_bf16) * b) // layers for a, b in pairs)
        return kept, again

    def _uniform_layer(self) -> tuple[int, int]:
        hidden = self.own * self.h * self.element
        attention = self.attention()
        ffn = self.norm("gate", "up") + self.feed_forward()
        # The norm is a part of the layer that is recomputed, unless it is a separate module: then
        # the input of that layer is saved in addition to that of the norm.
        separate_norm = self.fused_adapters and self.adapted
        inputs = 2 * hidden if separate_norm else hidden
        return {
            "none": (attention + ffn, 0),
            "swiglu": (attention + ffn, 0),  # without the input of down (input_of)
            "selective": (attention + inputs, ffn - inputs),
            "full": (hidden, attention + ffn - hidden),
        }[self.config.parallel.recompute]

    def constant(self, stage: int) -> int:
        """Return the bytes that do not depend on the number of micro-batches in flight."""
        size = _WORKSPACES
        if self.full:
            # Autograd gets an unused tensor, one per shape, instead of those gradients that were
            # accumulated in float32 already (module/base.py, get_dummy_wgrad).
            shapes = linear_layers(self.config.model).values()
            tp = self.config.parallel.tensor_parallel_size
            size += sum(math.prod(shape) for shape in shapes) // tp * self.element
        if self.fused_adapters:
            layers = self.config.model.num_layers // self.config.parallel.pipeline_parallel_size
            layer_parts = (("q", "k", "v"), ("gate", "up"))
            size += layers * sum(self._joined_factors(parts) for parts in layer_parts)
        return size

    def _joined_factors(self, parts: tuple[str, ...]) -> int:
        """Return the bytes of a layer's concatenated LoRA factors and of their summed gradients.

        See model/adapted.py.
        """
        adapter_rank = self.config.method.adapters.rank
        rank = sum(adapter_rank for part in parts if part in self.targets)
        elements = rank * self.h
        if adapter_rank < APART_FROM_RANK:
            elements += rank * sum(self.features[part][1] for part in parts)
        return elements * (self.element + 4)

    def in_fp8(self, elements: int) -> int:
        """Return the bytes of an FP8 copy of some elements; 0 where a layer is not in FP8."""
        return round(elements * self.fp8) if self.fp8 else 0

    def norm(self, *targets: str) -> int:
        """Return the bytes that RMSNorm saves; its output is the input of the layers `targets`.

        They are its input, one number per token, and its output.
        """
        elements = self.own * self.h
        return elements * self.element + self.own * 4 + self.input_of(targets, elements)

    def input_of(self, targets: tuple[str, ...], elements: int) -> int:
        """Return the bytes that a layer of these parts saves of its input, and for its adapters."""
        if self.full:  # for the weight's gradient, in the precision of the multiplication
            quantized = self.fp8 and "head" not in targets
            return self.in_fp8(elements) if quantized else elements * self.element
        adapted = [target for target in targets if target in self.targets]
        if not adapted:
            return 0
        kept = 0 if self._recomputes(targets) else elements * self.element
        if self.dropout:
            kept += self.dropped(elements)
        if not self.fused_adapters and targets[0] not in SHARDED_BY_INPUT:
            kept += self._beside_returned_norm(elements)
        return kept + self.adapters(adapted, targets)

    def _beside_returned_norm(self, elements: int) -> int:
        """Return the bytes that a layer with a fused norm saves if it returns the norm's output.

        It saves a copy in FP8; in bf16 that output itself (layernorm_linear.py, ln_out_to_save),
        which is also the adapters' input unless there is dropout.
        """
        if self.fp8:
            return self.in_fp8(elements)
        return elements * self.element if self.dropout else 0

    def dropped(self, elements: int) -> int:
        """Return the bytes that dropout saves besides its output: a byte of its mask for each."""
        return elements

    def adapters(self, adapted: list[str], parts: tuple[str, ...]) -> int:
        """Return the bytes that adapters save besides a layer's input.

        Fused adapters save only their hidden states.
        """
        if not self.fused_adapters:
            return super().adapters(adapted, parts)
        tokens = self.own if parts[0] in SHARDED_BY_INPUT else self.tokens
        return tokens * len(adapted) * self.config.method.adapters.rank * self.element

    def attention(self) -> int:
        """Return the bytes saved from the norm before attention to the input of o."""
        kept = self.norm("q", "k", "v") + self._core_attention() + self._input_of_o()
        kept += self.tokens * self.heads * 4  # logarithms of the softmax's sums
        if self.config.model.qk_norm:  # the inputs of these norms, and a number per head
            inputs = self.q + self.k
            heads = inputs // self.config.model.kv_channels
            kept += self.tokens * (inputs * self.element + heads * 4)
        if self.element == 4:  # no fused kernel supports float32: the scores' softmax is saved
            kept += self.heads * self.micro_batch_size * self.sequence**2 * 4
        return kept

    def _core_attention(self) -> int:
        """Return the saved bytes of rotated queries and keys, values and output.

        They are in FP8 with fp8.attention, except that with current scaling the output is saved in
        bf16 (backends.py, FusedAttnFunc).
        """
        inputs = self.tokens * (self.q + 2 * self.k)
        output = self.tokens * self.q
        if not (self.config.fp8.attention and self.fp8):
            return (inputs + output) * self.element
        kept = output * self.element if self._keeps_output() else self.in_fp8(output)
        return self.in_fp8(inputs) + kept

    def _keeps_output(self) -> bool:
        """Return whether attention saves its output in the form that is the input of o."""
        return not (self.config.fp8.attention and self.config.fp8_recipe == "delayed")

    def _input_of_o(self) -> int:
        """Return the bytes that o saves in addition to those that attention saves."""
        elements = self.tokens * self.q
        kept = self.input_of(("o",), elements)
        separate_copy = self.fp8 if self.full else self.dropout
        shared = kept and self._keeps_output() and not separate_copy
        return kept - (elements * self.element if shared else 0)

    def feed_forward(self) -> int:
        """Return the bytes saved of gate and up for SwiGLU's backward pass, and of down's input."""
        product = self.tokens * self.f
        return 2 * product * self.element + self.input_of(("down",), product)

    def forward(self) -> int:
        """Return the temporary bytes in the forward pass of unfused adapters on gate and up.

        They exceed what is saved at the end of the layer by the outputs of base and adapters, while
        the product of gate and up does not exist yet.
        """
        if not self.adapted or self.fused_adapters:
            return 0
        return (3 if self.reads_product else 4) * self.tokens * self.f * self.element

    def backward(self) -> int:
        """Return the temporary bytes in the backward pass of one layer, the most of three moments.

        In SwiGLU they are the gradients of its output and of its two factors. In the layer of gate
        and up they are the gradients of its input and, in FP8 besides bf16, of its output, with the
        transpose of a frozen weight; gate and up are freed. In both cases the saved input of down
        is freed, too. In attention they are the gradients of its output, of queries, keys and
        values, and a float32 sum of that of queries, when everything that the feed-forward layer
        saved is freed.
        """
        hidden = self.own * self.h * self.element
        product = self.tokens * self.f
        freed = self.input_of(("down",), product)
        swiglu = 3 * product * self.element - freed
        column = hidden + self._orders_of_gradient() * self.in_fp8(2 * product) - freed
        if not self.full and self.fp8 and not self.config.fp8.keep_transposed:
            column += self.in_fp8(2 * self.h * self.f)
        attention = self.tokens * (2 * (self.q + self.k) * self.element + self.q * 4)
        if self.context > 1:
            attention += self._ring()
        attention -= self.norm("gate", "up") + self.feed_forward()
        return hidden + max(swiglu, column, attention)

    def _orders_of_gradient(self) -> int:
        """Return the number of FP8 copies of the gradient of gate and up, transposed or not.

        A layer with a fused norm always makes both (layernorm_linear.py).
        """
        return 1 if self.fused_adapters and self.adapted else 2

    def _ring(self) -> int:
        """Return the bytes of other context-parallel ranks' keys and values and their gradients.

        There are two of each: one is sent while one is received.
        """
        return 4 * self.tokens * 2 * self.k * self.element

    def scoring(self, stage: int) -> int:
        """Return the bytes of a forward pass without a backward pass.

        They are hidden states with logits, or with gate, up and their product; with adapters on
        gate and up, the outputs of base and adapters, and the sums.
        """
        logits = 0
        if stage == self.config.parallel.pipeline_parallel_size - 1:
            all_tokens = self.tokens * (4 if self.element == 4 else 6)
            logits = all_tokens if self.full else self.of_piece() * self.element
        gates = (6 if self.adapted else 3) * self.tokens * self.f * self.element
        return 4 * self.own * self.h * self.element + max(logits * self.vocabulary, gates)

    def loss_by_pieces(self) -> int:
        """Return the temporary bytes of a frozen head and the loss.

        They are a piece's logits and their softmax, hidden states and their gradient. The float32
        values in between stay in the registers of a compiled kernel.
        """
        hidden = self.tokens * self.h
        gathered = hidden if self.config.parallel.sequence_parallel else 0
        logits = 2 * self.of_piece() * self.vocabulary
        return (self.own * self.h + gathered + hidden + logits) * self.element
