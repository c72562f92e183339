"""The activation memory of a rank, by arithmetic.

It covers megatron-core's layers with the attention in model/attention.py, as model/build.py builds
them on CPU: the tensors that autograd saves for the backward pass, and temporary ones.
activations_te.py covers Transformer Engine's layers.
"""

from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

SHARDED_BY_INPUT = ("o", "down")
# As in model/frozen_head.py: tokens per piece of the sequence, whose logits exist at the same time.
PIECE = 1024


def bytes_of_element(config: ModelSetup) -> int:
    """Return the bytes of an element of a weight or activation that is not in FP8."""
    return 4 if config.precision == "fp32" else 2


class Activations:
    """The saved and the temporary activations of one micro-batch on one rank, in bytes.

    All sizes are per rank: `tokens` of its matrix multiplications, `own` tokens (its share under
    sequence parallelism), and the numbers of features of the hidden state `h`, queries `q`, keys
    `k` (as many as values), and the feed-forward layer `f`.
    """

    def __init__(self, config: Config, micro_batch_size: int):
        model, parallel = config.model, config.parallel
        tp, self.context = parallel.tensor_parallel_size, parallel.context_parallel_size
        self.config = config
        self.element = bytes_of_element(config)
        self.full = config.method.lora is None
        self.targets: list[str] = []
        self.dropout = 0.0
        if lora := config.method.lora:
            self.targets += lora.targets
            self.dropout = lora.dropout
        self.sequence = config.data.seq_length // self.context
        self.tokens = micro_batch_size * self.sequence
        self.own = self.tokens // (tp if parallel.sequence_parallel else 1)
        self.heads = model.num_attention_heads // tp
        self.h = model.hidden_size
        self.f = model.ffn_hidden_size // tp
        self.vocabulary = config.padded_vocab_size // tp
        self.q = model.kv_channels * self.heads
        self.k = model.kv_channels * model.num_query_groups // tp
        self.adapted = not {"gate", "up"}.isdisjoint(self.targets)
        # Whether the input of down is saved for the gradient of a weight.
        self.recomputes_product = parallel.recompute == "swiglu"
        self.reads_product = self.full or ("down" in self.targets and not self.recomputes_product)
        outputs = {"q": self.q, "k": self.k, "v": self.k, "gate": self.f, "up": self.f}
        self.features = {target: (self.h, out) for target, out in outputs.items()} | {
            "o": (self.q, self.h),
            "down": (self.f, self.h),
        }

    def moments(self, stage: int) -> list[tuple[int, int]]:
        """Return (saved for the backward pass, temporary) at possible peaks of a training step."""
        parallel = self.config.parallel
        last = stage == self.config.parallel.pipeline_parallel_size - 1
        layers = self.config.model.num_layers // (
            parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
        )
        hidden = self.own * self.h * self.element
        kept, again = self.of_layer(stage)
        # Each chunk of layers also keeps its output, for the pipeline or the final norm.
        chunk = layers * kept + hidden
        in_flight = chunks_in_flight(self.config, stage)
        activations = in_flight * chunk + self.constant(stage)
        if parallel.virtual_pipeline_parallel_size > 1:
            # The interleaved schedule receives its next input and gradient in advance, and only
            # then frees the gradient that it has sent.
            activations += 3 * hidden
        if (
            stage == 0
            and parallel.recompute in ("none", "swiglu")
            and not self.full
            and {"q", "k", "v", "o"}.isdisjoint(self.targets)
        ):
            # Without trainable parameters before the first feed-forward layer no gradient passes
            # through what precedes it.
            activations -= (
                in_flight // parallel.virtual_pipeline_parallel_size * (self.attention() + hidden)
            )
        # During recomputation the layer's output and its gradient exist already.
        forward = self.forward() + (hidden if again else -hidden)
        moments = [(activations, again + max(self.backward(), forward))]
        if last:
            moments.append((activations, self.loss()))
        if stage == 0 and self.full:
            # The gradient of the embedding, computed last in a micro-batch.
            moments.append(
                (
                    (in_flight - 1) * chunk + self.constant(stage),
                    self.vocabulary * self.h * self.element,
                )
            )
        return moments

    def of_layer(self, stage: int) -> tuple[int, int]:
        """Return (saved for the backward pass, recomputed in it) of a layer of the stage."""
        hidden = self.own * self.h * self.element
        dropped = self.dropped(self.own * self.h) if self.config.dropout.hidden else 0
        attention = self.attention() + dropped
        norm = self.norm("gate", "up")
        ffn = self.feed_forward()
        return {
            "none": (attention + norm + ffn + dropped, 0),
            # Without the input of down (input_of).
            "swiglu": (attention + norm + ffn + dropped, 0),
            # Within a layer, everything after the norm and before dropout is recomputed.
            "selective": (attention + norm + dropped, ffn),
            # Only a layer's input is saved.
            "full": (hidden, attention + norm + ffn + dropped - hidden),
        }[self.config.parallel.recompute]

    def dropped(self, elements: int) -> int:
        """Return the bytes that dropout saves besides its output: here its mask as a factor."""
        return elements * self.element

    def constant(self, _stage: int) -> int:
        """Return the bytes independent of the number of micro-batches in flight: none here."""
        return 0

    def scoring(self, stage: int) -> int:
        """Return the bytes of a forward pass without a backward pass.

        They are hidden states and logits, or hidden states and the tensors of a feed-forward layer.
        """
        last = stage == self.config.parallel.pipeline_parallel_size - 1
        tokens = self.tokens if self.full else self.of_piece()
        logits = tokens * self.vocabulary * (4 if self.element == 4 else 6) if last else 0
        # gate and up, SiLU's output, up + 0 and their product; or gate and up of the base, the
        # outputs of the adapters, and the sums.
        gates = 6 if self.adapted else 5
        return 4 * self.own * self.h * self.element + max(
            logits, gates * self.tokens * self.f * self.element
        )

    def norm(self, *targets: str) -> int:
        """Return the bytes that RMSNorm saves; its output is the input of the layers `targets`."""
        elements = self.own * self.h
        # Its input is the residual stream. Composed of smaller operations it works in float32.
        kept = elements * 4 + self.own * 4
        if self.full:
            kept += elements * 4  # the normalised input, for the weight's gradient
        read_later = self.config.parallel.recompute == "selective" and "gate" in targets
        return kept + self._input_of(targets, elements, read_later=read_later)

    def input_of(self, targets: tuple[str, ...], elements: int) -> int:
        """Return the bytes that a linear layer saves: its input, and its adapters' hidden states.

        Args:
            targets: the names of its parts.
            elements: of the input, which is saved where a weight that multiplies it is trainable.
        """
        return self._input_of(targets, elements, read_later=False)

    def _input_of(self, targets: tuple[str, ...], elements: int, *, read_later: bool) -> int:
        """Do what input_of does; with read_later, recomputation needs the input in any case."""
        adapted = [target for target in targets if target in self.targets]
        stored = adapted and not self.dropout and not self._recomputes(targets)
        kept = elements * self.element if read_later or stored else 0
        if self.full and not read_later:
            in_fp8 = self.config.fp8_recipe and "head" not in targets
            # For the weight's gradient, in the precision of the multiplication.
            kept = elements * (1 if in_fp8 else self.element)
        if adapted and self.dropout:
            kept += elements * self.element + self.dropped(elements)
        return kept + (self.adapters(adapted, targets) if adapted else 0)

    def _recomputes(self, targets: tuple[str, ...]) -> bool:
        """Return whether the input of the layer of these parts is recomputed instead of saved."""
        return self.recomputes_product and "down" in targets

    def adapters(self, adapted: list[str], parts: tuple[str, ...]) -> int:
        """Return the bytes that the adapters of a layer save besides its input.

        They are hidden states, the adapters' factors where these are concatenated, and for DoRA the
        outputs of base and adapters.

        Args:
            adapted: the parts of the layer that have adapters.
            parts: all parts of the layer.
        """
        lora = self.config.method.adapters
        features_in = self.features[adapted[0]][0]
        features_out = sum(self.features[part][1] for part in parts)
        rank = len(adapted) * lora.rank * (2 if lora.pissa else 1)
        by_input = parts[0] in SHARDED_BY_INPUT
        tokens = self.own if by_input else self.tokens
        elements = tokens * rank
        if lora.pissa or not by_input:
            elements += rank * (features_in + features_out)
        if lora.dora:
            elements += 2 * tokens * features_out  # the outputs of the base and of the adapters
        return elements * self.element

    def attention(self) -> int:
        """Return the bytes saved from the norm before attention to the output of o."""
        tokens, element = self.tokens, self.element
        kept = self.norm("q", "k", "v")
        # The output of the linear layer for q, k and v: v is a view of it.
        kept += tokens * (self.q + 2 * self.k) * element
        kept += tokens * (self.q + self.k) * element  # q and k rotated
        # Cosines and sines for both.
        kept += 4 * self.sequence * self.config.model.kv_channels * element
        if self.config.model.qk_norm:
            kept += tokens * (self.q + self.k) * (4 if self.full else 0) + tokens * self.q * element
        if self.context > 1:
            kept += self.in_context()
        # The output of attention, and the logarithms of the softmax's sums.
        kept += tokens * self.q * element + tokens * self.heads * 4
        if self.config.dropout.attention:
            # The softmax, the mask of dropout and its output.
            kept += 3 * self.heads * self.scores() * element
        return kept + self.input_of(("o",), tokens * self.q if self.dropout else 0)

    def scores(self) -> int:
        """Return the number of pairs of a query and a key of one head, where all are computed.

        Under context parallelism a chunk of queries attends only to the keys up to its end.
        """
        if self.context == 1:
            return self.tokens * self.sequence
        return self.tokens * self.sequence * (2 * self.context + 1) // 4

    def in_context(self) -> int:
        """Return the additional bytes of attention under context parallelism.

        They are keys and values of the whole sequence instead of a part, and each part of the
        queries with its mask.
        """
        keys = 2 * self.tokens * self.context * self.k - self.tokens * (self.q + 3 * self.k)
        masks = (2 * self.context + 1) * (self.sequence // 2) ** 2
        return (keys + masks + self.tokens * self.q) * self.element

    def feed_forward(self) -> int:
        """Return the bytes that a feed-forward layer saves."""
        gate = self.tokens * self.f * self.element
        # gate and up as output by the linear layer, SiLU's output, megatron-core's up + 0. The
        # product of the latter two is the input of down. model.build's SwiGLU adds no 0.
        factors = 3 if self.recomputes_product else 4
        return factors * gate + self.input_of(("down",), self.tokens * self.f)

    def forward(self) -> int:
        """Return the temporary bytes in the forward pass of adapters on gate and up.

        They exceed what is saved at the end of the layer by the outputs of base and adapters, while
        SiLU's output, up + 0 and the input of down do not exist yet.
        """
        later = 3 if self.reads_product else 2
        return (4 - later) * self.tokens * self.f * self.element if self.adapted else 0

    def backward(self) -> int:
        """Return the temporary bytes in the backward pass of a feed-forward layer.

        They are the gradients of its output, of the product and of its two factors, less the
        product where it was saved and is freed; or those of the product and of the weight of down.
        """
        product = self.tokens * self.f * self.element
        weight = self.h * self.f * self.element if self.full else 0
        return self.own * self.h * self.element + max(
            (2 if self.reads_product else 3) * product, product + weight
        )

    def loss(self) -> int:
        """Return the temporary bytes of the output head and loss.

        They are the float32 softmax, overwritten by its gradient, and for bf16 the logits or their
        gradient in addition.
        """
        if not self.full:
            return self.norm("head") - self.own * self.h * self.element + self.loss_by_pieces()
        logits = self.tokens * self.vocabulary
        gradients = (self.tokens * self.h + self.vocabulary * self.h) * self.element
        final_norm = self.norm("head") - self.own * self.h * self.element  # its input is saved
        if self.config.parallel.sequence_parallel:
            # megatron-core's buffer for the gathered input.
            final_norm += self.tokens * self.h * self.element
        if self.element == 4:
            return final_norm + 4 * logits + gradients
        return final_norm + max(6 * logits, 2 * logits + gradients)

    def loss_by_pieces(self) -> int:
        """Return the temporary bytes of a frozen head and the loss (model/frozen_head.py).

        In the forward pass they are, for each logit of a piece, the logit and its float32
        exponential, in the same memory unless the logit is in bf16; one byte for whether it belongs
        to the label; and in bf16 the softmax. In addition there are the hidden states, gathered
        under sequence parallelism, and their gradient. In the backward pass they are that gradient,
        the labels' rows of the weight, and in float32 both terms and their sum.
        """
        hidden = self.tokens * self.h
        own = self.own * self.h
        states = own + (hidden if self.config.parallel.sequence_parallel else 0)
        logits = self.of_piece() * self.vocabulary * (5 if self.element == 4 else 9)
        return max((states + hidden) * self.element + logits, hidden * (2 * self.element + 3 * 4))

    def of_piece(self) -> int:
        """Return the number of tokens in the largest piece."""
        return min(PIECE, self.tokens)


def chunks_in_flight(config: Config, stage: int) -> int:
    """Return how many forward passes of this stage's chunks of layers await their backward pass.

    The schedules are 1F1B of megatron-core (https://arxiv.org/abs/2104.04473, section 2.2); the
    warm-up of the interleaved one is get_pp_rank_microbatches in megatron-core's schedules.py.
    """
    parallel, train = config.parallel, config.train
    stages, chunks = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    micro_batches = train.global_batch_size // (
        train.micro_batch_size * parallel.data_parallel_size
    )
    after = stages - stage - 1
    warmup = after if chunks == 1 else 2 * after + (chunks - 1) * stages
    return min(warmup + 1, micro_batches * chunks)
