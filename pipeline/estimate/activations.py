"""Activations that a rank keeps for the backward pass and works with, by arithmetic: those of megatron-core's own layers with our
attention (model/build.py, model/attention.py), which autograd keeps on CPU. activations_te.py has Transformer Engine's."""

from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

SHARDED_BY_INPUT = ("o", "down")
# model/frozen_head.py's: tokens of a piece of the sequence, whose logits are there at once.
PIECE = 1024


def bytes_of_element(config: ModelSetup) -> int:
    """Bytes of a weight, and of an activation, where they are not in FP8."""
    return 4 if config.precision == "fp32" else 2


class Activations:
    """What one rank keeps of a micro-batch, and works with, in bytes.

    Sizes are a rank's: tokens that its matrices see, own tokens (its share under sequence parallelism), and features of the
    hidden state h, queries q, keys k (as many as values), and the feed-forward layer f.
    """

    def __init__(self, config: Config, micro_batch_size: int):
        model, parallel = config.model, config.parallel
        tp, self.context = parallel.tensor_parallel_size, parallel.context_parallel_size
        self.config = config
        self.element = bytes_of_element(config)
        self.lora = config.method.lora
        self.full = config.method.lora is None
        self.sequence = config.data.seq_length // self.context
        self.tokens = micro_batch_size * self.sequence
        self.own = self.tokens // (tp if parallel.sequence_parallel else 1)
        self.heads = model.num_attention_heads // tp
        self.h = model.hidden_size
        self.f = model.ffn_hidden_size // tp
        self.vocabulary = config.padded_vocab_size // tp
        self.q = model.kv_channels * self.heads
        self.k = model.kv_channels * model.num_query_groups // tp
        targets = self.lora.targets if self.lora else []
        self.adapted = not {"gate", "up"}.isdisjoint(targets)
        self.reads_product = (
            self.full or "down" in targets
        )  # what down reads is kept for the gradient of a weight
        of_column = {"q": self.q, "k": self.k, "v": self.k, "gate": self.f, "up": self.f}
        self.features = {target: (self.h, out) for target, out in of_column.items()} | {
            "o": (self.q, self.h),
            "down": (self.f, self.h),
        }

    def moments(self, stage: int) -> list[tuple[int, int]]:
        """(kept for the backward pass, temporary) at those moments of a training step that may hold the most."""
        parallel = self.config.parallel
        last = stage == self.config.parallel.pipeline_parallel_size - 1
        layers = self.config.model.num_layers // (
            parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
        )
        hidden = self.own * self.h * self.element
        kept, again = self.of_layer(stage)
        # Each chunk of layers also holds what it gives on: to the pipeline, or to the final norm.
        chunk = layers * kept + hidden
        in_flight = chunks_in_flight(self.config, stage)
        activations = in_flight * chunk + self.constant(stage)
        if parallel.virtual_pipeline_parallel_size > 1:
            # The interleaved schedule receives what it works on next, an input and a gradient, and lets go of the gradient it sent then.
            activations += 3 * hidden
        if (
            stage == 0
            and parallel.recompute == "none"
            and self.lora
            and not {"q", "k", "v", "o"} & set(self.lora.targets)
        ):
            # Nothing trains before the first feed-forward layer: no gradient passes through what precedes it.
            activations -= (
                in_flight // parallel.virtual_pipeline_parallel_size * (self.attention() + hidden)
            )
        # Computed again, a layer's output is there already, and its gradient.
        forward = self.forward() + (hidden if again else -hidden)
        moments = [(activations, again + max(self.backward(), forward))]
        if last:
            moments.append((activations, self.loss()))
        if (
            stage == 0 and self.full
        ):  # the gradient of the embedding, when all else of a micro-batch is done
            moments.append(
                (
                    (in_flight - 1) * chunk + self.constant(stage),
                    self.vocabulary * self.h * self.element,
                )
            )
        return moments

    def of_layer(self, stage: int) -> tuple[int, int]:
        """(kept of a layer of the stage for the backward pass, computed again in it)"""
        attention = self.attention()
        norm = self.norm("gate", "up")
        ffn = self.feed_forward()
        hidden = self.own * self.h * self.element
        return {
            "none": (attention + norm + ffn, 0),
            "selective": (
                attention + norm,
                ffn,
            ),  # within a layer, what follows the norm is computed again
            "full": (hidden, attention + norm + ffn - hidden),  # a layer's input is kept
        }[self.config.parallel.recompute]

    def constant(self, _stage: int) -> int:
        """What is held beside, however many micro-batches wait: nothing here."""
        return 0

    def scoring(self, stage: int) -> int:
        """Of a forward pass that nothing follows: hidden states with logits, or with what a feed-forward layer makes of them."""
        last = stage == self.config.parallel.pipeline_parallel_size - 1
        scored = self.tokens if self.full else self.of_piece()
        logits = scored * self.vocabulary * (4 if self.element == 4 else 6) if last else 0
        # gate and up, SiLU's output, up + 0 and their product; or the base's gate and up, what adapters add, and the sum.
        gates = 6 if self.adapted else 5
        return 4 * self.own * self.h * self.element + max(
            logits, gates * self.tokens * self.f * self.element
        )

    def norm(self, *targets: str) -> int:
        """RMSNorm, of which the linear layers `targets` read."""
        elements = self.own * self.h
        # Its input is the residual stream. Composed of smaller operations it works in float32.
        kept = elements * 4 + self.own * 4
        if self.full:
            kept += elements * 4  # normalised, for the weight's gradient
        return kept + self.input_of(
            targets,
            elements,
            read_later=self.config.parallel.recompute == "selective" and "gate" in targets,
        )

    def input_of(self, targets: tuple[str, ...], elements: int, *, read_later: bool = False) -> int:
        """What a linear layer reads, which it keeps where a weight on it trains, and its adapters' hidden states."""
        adapted = [target for target in targets if self.lora and target in self.lora.targets]
        kept = elements * self.element if read_later or (adapted and not self.lora.dropout) else 0
        if self.full and not read_later:
            in_fp8 = self.config.fp8_recipe and "head" not in targets
            kept = elements * (
                1 if in_fp8 else self.element
            )  # for the weight's gradient, as it was multiplied
        if adapted and self.lora.dropout:
            kept += elements * 2 * self.element  # what dropout leaves, and its mask
        return kept + (self.adapters(adapted, targets) if adapted else 0)

    def adapters(self, adapted: list[str], parts: tuple[str, ...]) -> int:
        """What the adapters of a layer of these parts keep beside its input: hidden states, their factors where they are joined, and
        what DoRA computes with."""
        features_in = self.features[adapted[0]][0]
        features_out = sum(self.features[part][1] for part in parts)
        rank = len(adapted) * self.lora.rank * (2 if self.lora.pissa else 1)
        by_input = parts[0] in SHARDED_BY_INPUT
        tokens = self.own if by_input else self.tokens
        elements = tokens * rank
        if self.lora.pissa or not by_input:
            elements += rank * (features_in + features_out)
        if self.lora.dora:
            elements += 2 * tokens * features_out  # the base's output and the adapters'
        return elements * self.element

    def attention(self) -> int:
        tokens, element = self.tokens, self.element
        kept = self.norm("q", "k", "v")
        kept += (
            tokens * (self.q + 2 * self.k) * element
        )  # q, k, v as the linear layer gives them: v is a view of it
        kept += tokens * (self.q + self.k) * element  # q and k rotated
        kept += (
            4 * self.sequence * self.config.model.kv_channels * element
        )  # cosines and sines for both
        if self.config.model.qk_norm:
            kept += tokens * (self.q + self.k) * (4 if self.full else 0) + tokens * self.q * element
        if self.context > 1:
            kept += self.in_context()
        kept += (
            tokens * self.q * element + tokens * self.heads * 4
        )  # attention's output, and the logarithms of its sums
        return kept + self.input_of(
            ("o",), 0 if not (self.lora and self.lora.dropout) else tokens * self.q
        )

    def in_context(self) -> int:
        """Beyond that: keys and values of the whole sequence instead of a part's, and each part of the queries with its mask."""
        keys = 2 * self.tokens * self.context * self.k - self.tokens * (self.q + 3 * self.k)
        masks = (2 * self.context + 1) * (self.sequence // 2) ** 2
        return (keys + masks + self.tokens * self.q) * self.element

    def feed_forward(self) -> int:
        gate = self.tokens * self.f * self.element
        # gate and up as the linear layer gives them, SiLU's output, megatron-core's up + 0; their product is read by down.
        return 4 * gate + self.input_of(("down",), self.tokens * self.f)

    def forward(self) -> int:
        """Of adapters on gate and up, beyond what is kept once the layer is done: the base's output and what is added to it, while
        SiLU's output, up + 0 and down's input are not there yet."""
        later = 3 if self.reads_product else 2
        return (4 - later) * self.tokens * self.f * self.element if self.adapted else 0

    def backward(self) -> int:
        """Of a feed-forward layer, beyond what is kept: the gradients of its output, of the product and of its two factors, less the
        product where it was kept and is gone; or those of the product and of down's weight."""
        product = self.tokens * self.f * self.element
        weight = self.h * self.f * self.element if self.full else 0
        return self.own * self.h * self.element + max(
            (2 if self.reads_product else 3) * product, product + weight
        )

    def loss(self) -> int:
        """Of logits: the float32 softmax in the place of its gradient, and of bf16 the logits or their gradient beside it."""
        if not self.full:
            return self.norm("head") - self.own * self.h * self.element + self.loss_by_pieces()
        logits = self.tokens * self.vocabulary
        gradients = (self.tokens * self.h + self.vocabulary * self.h) * self.element
        final_norm = self.norm("head") - self.own * self.h * self.element  # whose input is kept
        if self.config.parallel.sequence_parallel:
            final_norm += (
                self.tokens * self.h * self.element
            )  # megatron-core's buffer for the gathered input
        if self.element == 4:
            return final_norm + 4 * logits + gradients
        return final_norm + max(6 * logits, 2 * logits + gradients)

    def loss_by_pieces(self) -> int:
        """Of a frozen head (model/frozen_head.py): a piece's logits, or what the backward pass makes of what it kept of all.

        For each of the piece's logits that and its float32 power, in the same place unless they are in bf16, a byte for
        whether it is the label's, and in bf16 the softmax. Beside them hidden states, under sequence parallelism gathered,
        and their gradient. In the backward pass that, the labels' rows of the weight, and in float32 both terms and their sum.
        """
        hidden = self.tokens * self.h
        own = self.own * self.h
        states = own + (hidden if self.config.parallel.sequence_parallel else 0)
        logits = self.of_piece() * self.vocabulary * (5 if self.element == 4 else 9)
        return max((states + hidden) * self.element + logits, hidden * (2 * self.element + 3 * 4))

    def of_piece(self) -> int:
        """Tokens of the largest piece."""
        return min(PIECE, self.tokens)


def chunks_in_flight(config: Config, stage: int) -> int:
    """Forward passes of this stage's chunks of layers that wait for their backward pass, in megatron-core's 1F1B schedules.

    https://arxiv.org/abs/2104.04473, 2.2; the interleaved one's warm-up is get_pp_rank_microbatches of megatron-core's schedules.py.
    """
    parallel, train = config.parallel, config.train
    stages, chunks = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    micro_batches = train.global_batch_size // (
        train.micro_batch_size * parallel.data_parallel_size
    )
    after = stages - stage - 1
    warmup = after if chunks == 1 else 2 * after + (chunks - 1) * stages
    return min(warmup + 1, micro_batches * chunks)
