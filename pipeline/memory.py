"""Parameters and bytes of a run on a rank, by arithmetic alone. What it says is held to built models and to measured training steps
by tests/multiproc/test_planned.py.

The activations are those of megatron-core's own layers with our attention (model/build.py, model/attention.py), which autograd
keeps. Transformer Engine's layers have other kernels, and nothing was measured on a GPU yet.
"""

import math
from collections import Counter
from dataclasses import dataclass

from retemper.pipeline.flops import linear_layers
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

# Elements by (adapter or base, sharded over tensor-parallel ranks or on each of them).
Weights = Counter[tuple[str, bool]]
_SHARDED_BY_INPUT = ("o", "down")


def parameter_counts(setup: ModelSetup) -> tuple[int, int]:
    """(trainable, frozen) elements of the whole model, the vocabulary's padding among them: model.build's, without building it."""
    layers, model = _layer_weights(setup), setup.model
    whole = Counter({kind: count * model.num_layers for kind, count in layers.items()})
    whole["base", True] += setup.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    whole["base", False] += model.hidden_size
    return _trainable_and_frozen(setup, {kind: sum(whole[kind, sharded] for sharded in (True, False)) for kind in _KINDS})


_KINDS = ("base", "adapters", "initial")  # the last are PiSSA's frozen factors


def _trainable_and_frozen(setup: ModelSetup, count: dict[str, int]) -> tuple[int, int]:
    if setup.method.name == "full":
        return count["base"], 0
    return count["adapters"], count["base"] + count["initial"]


def _layer_weights(setup: ModelSetup) -> Weights:
    model, lora, count = setup.model, setup.method.lora, Counter()
    sizes = linear_layers(model)
    count["base", True] = sum(features_in * features_out for features_in, features_out in sizes.values())
    count["base", False] = 2 * model.hidden_size + (2 * model.kv_channels if model.qk_norm else 0)  # norms
    if model.qkv_bias:
        count["base", True] += sum(sizes[name][1] for name in ("q", "k", "v"))
    for target in lora.targets if lora else ():
        features_in, features_out = sizes[target]
        A, B = lora.rank * features_in, lora.rank * features_out
        by_input = target in _SHARDED_BY_INPUT
        for kind in ("adapters", "initial") if lora.pissa else ("adapters",):
            count[kind, by_input] += A
            count[kind, not by_input] += B
        if lora.dora:
            count["adapters", not by_input] += features_out  # the magnitude
    return count


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of training and scoring on the ranks of one pipeline stage."""

    stage: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # that the forward pass leaves for the backward pass
    temporary: int  # logits and loss, or what the backward pass of one layer works with

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.temporary


def worst_rank(config: Config, *, fused: bool = True) -> RankMemory:
    """Of the pipeline stage that holds the most. fused: by torch's kernels for RMSNorm and dropout, as on a GPU; on CPU they are composed."""
    stages = range(config.parallel.pipeline_parallel_size)
    return max((rank_memory(config, stage, fused=fused) for stage in stages), key=lambda memory: memory.total)


def rank_memory(config: Config, stage: int, *, fused: bool = True) -> RankMemory:
    """Of the ranks of one pipeline stage, counted from 0."""
    parallel, element = config.parallel, _element(config)
    held = _stage_weights(config, stage)
    trainable, _ = _trainable_and_frozen(config, held)
    # megatron-core's distributed optimizer: gradients are reduced in float32; float32 moments, and of bf16 weights a float32
    # copy, are shared among data- and context-parallel ranks. Float32 weights are updated where they are.
    state = 4 * moments_of(config) + (0 if config.precision == "fp32" else 4)
    moments = _Activations(config, config.train.micro_batch_size, fused).moments(stage)
    if config.evals.heldout:
        scored_together = min(config.evals.micro_batch_size, math.ceil(config.evals.max_samples / parallel.data_parallel_size))
        moments.append((0, _Activations(config, scored_together, fused).scoring(stage)))
    activations, temporary = max(moments, key=sum)
    return RankMemory(
        stage=stage,
        weights=held["base"] * element + _of_fp8(config, stage),
        adapters=(held["adapters"] + held["initial"]) * element,
        gradients=trainable * 4,
        optimizer=trainable * state // (parallel.data_parallel_size * parallel.context_parallel_size),
        activations=activations,
        temporary=temporary,
    )


def moments_of(config: Config) -> int:
    """How many numbers the optimizer keeps of a gradient's history for each trained one."""
    return {"adamw": 2, "lion": 1}[config.optimizer.name]


def _element(config: ModelSetup) -> int:
    """Bytes of a weight, and of an activation, where they are not in FP8."""
    return 4 if config.precision == "fp32" else 2


def _of_fp8(config: ModelSetup, stage: int) -> int:
    """Bytes of a stage's linear layers in FP8, beyond those they take in bf16; less than none where FP8 alone is kept.

    Transformer Engine multiplies both orders of a weight, and keeps both of what trains; of a frozen one with one scale a tensor one
    (model/fp8.py). Scales are one in float32 for 128 × 128 numbers, or a byte for 32.
    """
    if config.fp8_recipe is None:
        return 0
    model, parallel = config.model, config.parallel
    layers = model.num_layers // parallel.pipeline_parallel_size
    kept_whole = config.fp8.bf16_layers * ((stage == 0) + (stage == parallel.pipeline_parallel_size - 1))
    elements = (layers - kept_whole) * sum(math.prod(sizes) for sizes in linear_layers(model).values()) // parallel.tensor_parallel_size
    one_order = config.method.name == "lora" and config.fp8_recipe in ("delayed", "tensorwise")
    scale = {"delayed": 0, "tensorwise": 0, "blockwise": 4 / 128**2, "mxfp8": 1 / 32}[config.fp8_recipe]
    return round(elements * ((1 if one_order else 2) * (1 + scale) - (2 if config.fp8_weights else 0)))


def _stage_weights(config: ModelSetup, stage: int) -> dict[str, int]:
    """Elements on one rank by kind."""
    model, parallel = config.model, config.parallel
    layers = model.num_layers // parallel.pipeline_parallel_size
    count = Counter({kind: elements * layers for kind, elements in _layer_weights(config).items()})
    first, last = stage == 0, stage == parallel.pipeline_parallel_size - 1
    # A last stage that is not the first holds a copy of a tied embedding.
    matrices = 1 if first and last and model.tie_embeddings else first + last
    count["base", True] += config.padded_vocab_size * model.hidden_size * matrices
    count["base", False] += model.hidden_size * last  # the final norm
    return {kind: count[kind, True] // parallel.tensor_parallel_size + count[kind, False] for kind in _KINDS}


class _Activations:
    """What one rank keeps of a micro-batch, and works with, in bytes.

    Sizes are a rank's: tokens that its matrices see, own tokens (its share under sequence parallelism), and features of the
    hidden state h, queries q, keys k (as many as values), and the feed-forward layer f.
    """

    def __init__(self, config: Config, micro_batch_size: int, fused: bool):
        model, parallel = config.model, config.parallel
        tp, self.context = parallel.tensor_parallel_size, parallel.context_parallel_size
        self.config, self.fused, self.element = config, fused, _element(config)
        self.lora, self.full = config.method.lora, config.method.lora is None
        self.sequence = config.data.seq_length // self.context
        self.tokens = micro_batch_size * self.sequence
        self.own = self.tokens // (tp if parallel.sequence_parallel else 1)
        self.heads = model.num_attention_heads // tp
        self.h, self.f, self.vocabulary = model.hidden_size, model.ffn_hidden_size // tp, config.padded_vocab_size // tp
        self.q, self.k = model.kv_channels * self.heads, model.kv_channels * model.num_query_groups // tp
        targets = self.lora.targets if self.lora else []
        self.adapted = not {"gate", "up"}.isdisjoint(targets)
        self.reads_product = self.full or "down" in targets  # what down reads is kept for the gradient of a weight
        of_column = {"q": self.q, "k": self.k, "v": self.k, "gate": self.f, "up": self.f}
        self.features = {target: (self.h, out) for target, out in of_column.items()} | {"o": (self.q, self.h), "down": (self.f, self.h)}

    def moments(self, stage: int) -> list[tuple[int, int]]:
        """(kept for the backward pass, temporary) at those moments of a training step that may hold the most."""
        parallel, last = self.config.parallel, stage == self.config.parallel.pipeline_parallel_size - 1
        layers = self.config.model.num_layers // (parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size)
        attention, norm, ffn = self.attention(), self.norm("gate", "up"), self.feed_forward()
        hidden = self.own * self.h * self.element
        kept, again = {
            "none": (attention + norm + ffn, 0),
            "selective": (attention + norm, ffn),  # within a layer, what follows the norm is computed again
            "full": (hidden, attention + norm + ffn - hidden),  # a layer's input is kept
        }[parallel.recompute]
        # Each chunk of layers also holds what it gives on: to the pipeline, or to the final norm.
        chunk, in_flight = layers * kept + hidden, _chunks_in_flight(self.config, stage)
        activations = in_flight * chunk
        if parallel.virtual_pipeline_parallel_size > 1:
            # The interleaved schedule receives what it works on next, an input and a gradient, and lets go of the gradient it sent then.
            activations += 3 * hidden
        if stage == 0 and parallel.recompute == "none" and self.lora and not {"q", "k", "v", "o"} & set(self.lora.targets):
            # Nothing trains before the first feed-forward layer: no gradient passes through what precedes it.
            activations -= in_flight // parallel.virtual_pipeline_parallel_size * (attention + hidden)
        # Computed again, a layer's output is there already, and its gradient.
        forward = self.forward() + (hidden if again else -hidden)
        moments = [(activations, again + max(self.backward(), forward))]
        if last:
            moments.append((activations, self.loss()))
        if stage == 0 and self.full:  # the gradient of the embedding, when all else of a micro-batch is done
            moments.append(((in_flight - 1) * chunk, self.vocabulary * self.h * self.element))
        return moments

    def scoring(self, stage: int) -> int:
        """Of a forward pass that nothing follows: hidden states with logits, or with what a feed-forward layer makes of them."""
        last = stage == self.config.parallel.pipeline_parallel_size - 1
        logits = self.tokens * self.vocabulary * (4 if self.element == 4 else 6) if last else 0
        # gate and up, SiLU's output, up + 0 and their product; or the base's gate and up, what adapters add, and the sum.
        gates = 6 if self.adapted else 5
        return 4 * self.own * self.h * self.element + max(logits, gates * self.tokens * self.f * self.element)

    def norm(self, *targets: str) -> int:
        """RMSNorm, of which the linear layers `targets` read."""
        elements = self.own * self.h
        # Its input is the residual stream. Composed of smaller operations it works in float32.
        kept = elements * (self.element if self.fused else 4) + self.own * 4
        if self.full and not self.fused:
            kept += elements * 4  # normalised, for the weight's gradient
        return kept + self.input_of(targets, elements, read_later=self.config.parallel.recompute == "selective" and "gate" in targets)

    def input_of(self, targets: tuple[str, ...], elements: int, *, read_later: bool = False) -> int:
        """What a linear layer reads, which it keeps where a weight on it trains, and its adapters' hidden states."""
        adapted = [target for target in targets if self.lora and target in self.lora.targets]
        kept = elements * self.element if read_later or (adapted and not self.lora.dropout) else 0
        if self.full and not read_later:
            in_fp8 = self.config.fp8_recipe and "head" not in targets
            kept = elements * (1 if in_fp8 else self.element)  # for the weight's gradient, as it was multiplied
        if adapted and self.lora.dropout:
            kept += elements * (self.element + (1 if self.fused else self.element))  # what dropout leaves, and its mask
        return kept + (self.adapters(adapted, targets) if adapted else 0)

    def adapters(self, adapted: list[str], parts: tuple[str, ...]) -> int:
        """What the adapters of a layer of these parts keep beside its input: hidden states, their factors where they are joined, and
        what DoRA computes with."""
        features_in, features_out = self.features[adapted[0]][0], sum(self.features[part][1] for part in parts)
        rank = len(adapted) * self.lora.rank * (2 if self.lora.pissa else 1)
        by_input = parts[0] in _SHARDED_BY_INPUT
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
        kept += tokens * (self.q + 2 * self.k) * element  # q, k, v as the linear layer gives them: v is a view of it
        kept += tokens * (self.q + self.k) * element  # q and k rotated
        kept += 4 * self.sequence * self.config.model.kv_channels * element  # cosines and sines for both
        if self.config.model.qk_norm:
            kept += tokens * (self.q + self.k) * (4 if self.full and not self.fused else 0) + tokens * self.q * element
        if self.context > 1:
            kept += self.in_context()
        kept += tokens * self.q * element + tokens * self.heads * 4  # attention's output, and the logarithms of its sums
        return kept + self.input_of(("o",), 0 if not (self.lora and self.lora.dropout) else tokens * self.q)

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
        return self.own * self.h * self.element + max((2 if self.reads_product else 3) * product, product + weight)

    def loss(self) -> int:
        """Of logits: the float32 softmax in the place of its gradient, and of bf16 the logits or their gradient beside it."""
        logits = self.tokens * self.vocabulary
        gradients = (self.tokens * self.h + (self.vocabulary * self.h if self.full else 0)) * self.element
        final_norm = self.norm("head") - self.own * self.h * self.element  # whose input is kept
        if self.config.parallel.sequence_parallel and self.full:
            final_norm += self.tokens * self.h * self.element  # megatron-core's buffer for the gathered input
        if self.element == 4:
            return final_norm + 4 * logits + gradients
        return final_norm + max(6 * logits, 2 * logits + gradients)


def _chunks_in_flight(config: Config, stage: int) -> int:
    """Forward passes of this stage's chunks of layers that wait for their backward pass, in megatron-core's 1F1B schedules.

    https://arxiv.org/abs/2104.04473, 2.2; the interleaved one's warm-up is get_pp_rank_microbatches of megatron-core's schedules.py.
    """
    parallel, train = config.parallel, config.train
    stages, chunks = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    micro_batches = train.global_batch_size // (train.micro_batch_size * parallel.data_parallel_size)
    after = stages - stage - 1
    warmup = after if chunks == 1 else 2 * after + (chunks - 1) * stages
    return min(warmup + 1, micro_batches * chunks)
