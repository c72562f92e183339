"""The rules between config keys: each broken rule becomes a sentence that says what to change."""

import math
from collections.abc import Iterator

from retemper.pipeline.config.schedules import largest_warmup, length_of
from retemper.pipeline.errors import nearest
from retemper.pipeline.schema.data import REPLAY, DataConfig
from retemper.pipeline.schema.evals import TASKS_WITH_FILES
from retemper.pipeline.schema.model import LoraConfig, ModelConfig, ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.shapes import linear_layers
from retemper.pipeline.schema.train import ScheduleConfig


def data_conflicts(data: DataConfig) -> Iterator[str]:
    """Yield a message for every broken rule between the keys of a corpus."""
    if data.executor == "slurm" and data.slurm is None:
        yield "data.executor=slurm needs data.slurm.partition=NAME"
    if data.source.prompt is not None and data.source.kind != "rows":
        yield (
            "data.source.prompt refers to columns of rows, "
            f"but data.source.kind={data.source.kind}: set data.source.kind=rows"
        )
    if "\\n" in (data.source.prompt or ""):
        yield (
            "data.source.prompt contains a backslash and an n, which is no line break: "
            "on the command line write $'data.source.prompt=\"Q: {ask}\\nA: \"', "
            "with the dollar before the quotes"
        )
    if data.tokens is not None and data.tokens < data.seq_length:
        yield (
            f"data.tokens={data.tokens} is less than one sample "
            f"of data.seq_length={data.seq_length}"
        )
    if "://" in data.path and not data.path.startswith(("s3://", "gs://")):
        yield f"data.path={data.path}: shards can be written to a folder, s3:// or gs://"
    yield from _mixture_conflicts(data)


def _mixture_conflicts(data: DataConfig) -> Iterator[str]:
    streams = data.mixed_in
    for name in {data.name, REPLAY} & data.mixture.keys():
        yield f"data.mixture.{name}: that name is taken; choose another for this corpus"
    for name, stream in streams.items():
        samples = stream.fraction * data.mixture_window
        if abs(samples - round(samples)) > 1e-6 or not round(samples):
            yield (
                f"the fraction {stream.fraction} of {name} is not a whole number of samples "
                f"of data.mixture_window={data.mixture_window}: round it, or set a longer window"
            )
    if (
        sum(round(stream.fraction * data.mixture_window) for stream in streams.values())
        >= data.mixture_window
    ):
        yield (
            "the fractions of data.mixture and data.replay leave nothing for the run's own corpus: "
            "their sum must be less than 1"
        )


def setup_conflicts(config: ModelSetup) -> Iterator[str]:
    """Yield a message for every broken rule between a model and its parallel layout."""
    model, parallel, method = config.model, config.parallel, config.method
    tp, pp, vpp = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_parallel_size,
    )
    if parallel.recompute == "swiglu" and not (
        config.fused_adapters and "down" in method.adapters.targets
    ):
        yield (
            "parallel.recompute=swiglu requires method=lora with down among method.lora.targets, "
            "method.lora.kernel=fused, and no dropout, dora, pissa or overlap: "
            "set parallel.recompute=selective"
        )
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            yield (
                f"parallel.tensor_parallel_size={tp} does not divide "
                f"model.{key}={getattr(model, key)}"
            )
    if model.num_layers % (pp * vpp):
        sizes = f"parallel.pipeline_parallel_size={pp}" + (
            f" × parallel.virtual_pipeline_parallel_size={vpp}" if vpp > 1 else ""
        )
        yield f"{sizes} does not divide model.num_layers={model.num_layers}"
    if vpp > 1 and pp == 1:
        yield (
            f"parallel.virtual_pipeline_parallel_size={vpp} "
            "needs parallel.pipeline_parallel_size > 1"
        )
    if model.head_size is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} does not divide "
            f"model.hidden_size={model.hidden_size}"
        )
    elif model.kv_channels % 2:
        yield (
            f"the head size is {model.kv_channels} (model.head_size, or hidden_size / "
            "num_attention_heads), but rotary embeddings need an even one"
        )
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_query_groups={model.num_query_groups} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_parallel_size > 1"
    if method.name == "lora" and method.lora is None:
        yield "method.name=lora needs method.lora (rank, targets): use the preset method=lora"
    if method.lora and method.lora.alpha is None:
        scaled_by_two = f"{2 * math.sqrt(method.lora.rank):.6g}"
        yield (
            "method.lora.rslora=true scales by alpha / sqrt(rank), for which no alpha is usual: "
            f"set method.lora.alpha; with method.lora.rank={method.lora.rank} "
            f"method.lora.alpha={scaled_by_two} gives a scale of 2"
        )
    if method.lora and method.lora.dora and method.lora.dropout:
        yield (
            "method.lora.dora=true cannot be combined with method.lora.dropout: the norm of a "
            "weight row assumes the whole input; set one of them to its default"
        )
    if method.lora and method.lora.pissa:
        yield from _pissa_conflicts(method.lora, model)
    if method.name == "full" and method.lora is not None:
        yield (
            "method.name=full trains every weight, but method.lora is set: "
            "use the preset method=lora, or set method.lora=null"
        )
    if parallel.tensor_parallel_overlap and not parallel.sequence_parallel:
        yield "parallel.tensor_parallel_overlap=true needs parallel.sequence_parallel=true"
    if parallel.tensor_parallel_overlap and config.precision in ("fp32", "fp8_blockwise"):
        yield (
            "parallel.tensor_parallel_overlap=true cannot be combined with "
            f"precision={config.precision}: set it to false"
        )
    yield from _fp8_conflicts(config)


def _pissa_conflicts(lora: LoraConfig, model: ModelConfig) -> Iterator[str]:
    layers = linear_layers(model)
    target = min(lora.targets, key=lambda name: min(layers[name]))
    features_in, features_out = layers[target]
    if lora.rank > (most := min(features_in, features_out)):
        yield (
            f"method.lora.pissa=true takes method.lora.rank={lora.rank} principal components, but "
            f"the weight of {target}, {features_out} × {features_in}, has {most}: "
            f"set method.lora.rank={most} or less"
        )


# Multiples that Transformer Engine's kernels require: of features, and of a micro-batch's tokens.
_FP8_MULTIPLES = {
    "delayed": (16, 8),
    "tensorwise": (16, 8),
    "blockwise": (128, 128),
    "mxfp8": (32, 32),
}

# What cuDNN's FP8 attention requires on Hopper: the size of a head, and a divisor of the length of
# a sequence (seen as Transformer Engine 2.19 finds no kernel for 64 with cuDNN 9.14).
_FP8_ATTENTION = 128


def fp8_token_multiple(config: ModelSetup) -> int:
    """Return the number that divides the tokens of every batch on a rank."""
    return _FP8_MULTIPLES[config.fp8_recipe][1] if config.fp8_recipe else 1


def _fp8_conflicts(config: ModelSetup) -> Iterator[str]:
    recipe = config.fp8_recipe
    lora = config.method.lora
    tp = config.parallel.tensor_parallel_size
    if recipe is None:
        if config.fp8 != type(config.fp8)():
            yield (
                f"fp8.* is set, but precision={config.precision}: "
                "set precision=fp8_delayed, fp8_tensorwise, fp8_blockwise or mxfp8"
            )
        return
    if lora and (lora.dora or lora.pissa):
        yield (
            f"precision={config.precision} cannot be combined with method.lora.dora or pissa: "
            "both compute with the weights of the base, which FP8 rounds"
        )
    if lora and recipe == "delayed":
        yield (
            "precision=fp8_delayed needs amax history from earlier steps, which frozen weights do "
            "not have: set precision=fp8_tensorwise with method=lora"
        )
    if lora and config.fp8.param_gather:
        yield (
            "fp8.param_gather=true only applies to method=full: "
            "with method=lora the base is stored in FP8 anyway"
        )
    if config.fp8.param_gather and recipe == "mxfp8":
        yield "fp8.param_gather=true cannot be combined with precision=mxfp8: leave it out"
    if config.fp8.keep_transposed and not (lora and recipe == "tensorwise"):
        yield (
            "fp8.keep_transposed=true only applies to method=lora with precision=fp8_tensorwise: "
            "other weights are stored in both layouts anyway"
        )
    if config.fp8.attention and recipe not in ("delayed", "tensorwise"):
        yield (
            "fp8.attention=true requires precision=fp8_tensorwise or fp8_delayed, "
            f"not {config.precision}"
        )
    if config.fp8.attention and config.model.kv_channels != _FP8_ATTENTION:
        yield (
            f"fp8.attention=true requires heads of {_FP8_ATTENTION} features (model.head_size), "
            f"as its kernels on Hopper do, not {config.model.kv_channels}: set it to false"
        )
    if config.fp8.bf16_layers and recipe == "delayed":
        yield (
            "fp8.bf16_layers cannot be combined with precision=fp8_delayed, whose scales apply to "
            "the whole model: set precision=fp8_tensorwise, or fp8.bf16_layers=0"
        )
    if config.fp8.bf16_layers > (
        layers_per_stage := config.model.num_layers // config.parallel.pipeline_parallel_size
    ):
        yield (
            f"fp8.bf16_layers={config.fp8.bf16_layers} is more than the {layers_per_stage} layers "
            "of a pipeline stage"
        )
    multiple, _ = _FP8_MULTIPLES[recipe]
    out = {
        name: features_out // tp for name, (_, features_out) in linear_layers(config.model).items()
    }
    fused = {
        "hidden state": config.model.hidden_size,
        "q, k and v": out["q"] + out["k"] + out["v"],
        "q": out["q"],
        "gate": out["gate"],
    }
    for name, features in fused.items():
        if features % multiple:
            yield (
                f"precision={config.precision} requires numbers of features divisible by "
                f"{multiple}, but {name} has {features} on a rank"
            )


def _fp8_batch_conflicts(config: Config) -> Iterator[str]:
    parallel = config.parallel
    multiple = fp8_token_multiple(config)
    parts = parallel.context_parallel_size * (
        parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    )
    if config.fp8.attention and config.data.seq_length % _FP8_ATTENTION:
        yield (
            f"fp8.attention=true requires a data.seq_length divisible by {_FP8_ATTENTION}, "
            f"not {config.data.seq_length}: set it to false"
        )
    tokens = config.train.micro_batch_size * config.data.seq_length // parts
    if tokens % multiple:
        yield (
            f"precision={config.precision} requires micro-batches whose number of tokens is "
            f"divisible by {multiple}; train.micro_batch_size and data.seq_length "
            f"result in {tokens} on a rank"
        )
    elif config.evals.heldout and config.data.seq_length // parts % multiple:
        yield (
            f"precision={config.precision} requires a data.seq_length whose part on a rank is "
            f"divisible by {multiple}, because held-out evaluation may run any number of samples "
            f"at once; its part is {config.data.seq_length // parts} tokens"
        )


def _overlap_conflicts(config: Config) -> Iterator[str]:
    train, evals = config.train, config.evals
    if not (config.parallel.tensor_parallel_overlap and evals.heldout):
        return
    samples_at_once = train.micro_batch_size * config.parallel.data_parallel_size
    if evals.micro_batch_size != train.micro_batch_size or evals.max_samples % samples_at_once:
        yield (
            "parallel.tensor_parallel_overlap=true has buffers for micro-batches of one size: "
            f"set evals.micro_batch_size={train.micro_batch_size} "
            f"and evals.max_samples to a multiple of {samples_at_once}, or evals.heldout={{}}"
        )


def _branch_conflicts(config: Config) -> Iterator[str]:
    if config.train.branches and config.branch_of:
        yield "train.branches: a branch has no branches; remove branch_of or train.branches"
    if (config.train.branches or config.branch_of) and not (
        config.schedule.name == "trapezoid" and config.schedule.cooldown_fraction
    ):
        yield (
            "branches cool down from a constant learning rate: "
            "set schedule=trapezoid with a schedule.cooldown_fraction above 0"
        )
    for tokens, step in zip(config.train.branches, config.branch_steps, strict=True):
        if not 1 <= step <= config.steps:
            yield (
                f"train.branches: the cooldown of {tokens} begins after step {step}, "
                f"but train.tokens={config.train.tokens} is {config.steps} steps; "
                "it must begin after one of them, from step 1 to the last"
            )


def graph_conflicts(config: Config) -> Iterator[str]:
    """Yield every reason why a micro-batch's passes cannot be recorded as a CUDA graph.

    The graph itself is in model/graph.py.
    """
    parallel = config.parallel
    if parallel.pipeline_parallel_size > 1:
        yield "parallel.pipeline_parallel_size > 1: stages wait for each other between kernels"
    if config.data.mask_documents:
        yield "data.mask_documents=true: attention shapes change with the documents"
    if parallel.overlap or parallel.tensor_parallel_overlap:
        yield "parallel.overlap and tensor_parallel_overlap start communication from the host"
    if config.precision == "fp8_delayed" or config.fp8.param_gather:
        yield (
            "precision=fp8_delayed and fp8.param_gather=true track on the host "
            "which scales and weights are new"
        )


def _graph_conflicts(config: Config) -> Iterator[str]:
    if config.train.cuda_graph == "on":
        for reason in graph_conflicts(config):
            yield f"train.cuda_graph=on cannot be combined with {reason}; set train.cuda_graph=auto"


def _schedule_conflicts(schedule: ScheduleConfig) -> Iterator[str]:
    if schedule.name == "inverse_sqrt" and not schedule.warmup_tokens:
        yield (
            "schedule.name=inverse_sqrt decays as sqrt(schedule.warmup_tokens / tokens): "
            "set schedule.warmup_tokens above 0"
        )
    if schedule.name != "trapezoid" and schedule.cooldown_fraction:
        yield (
            "schedule.cooldown_fraction only applies to schedule=trapezoid: "
            f"set it to 0 with schedule.name={schedule.name}, or set schedule=trapezoid"
        )


def beginning_conflicts(config: Config) -> Iterator[str]:
    """Yield a message for every broken rule that only a new run must keep.

    An existing run that breaks one may still be resumed and read.
    """
    warmup = config.schedule.warmup_tokens
    largest = largest_warmup(config)
    if not config.branch_of and largest < warmup < length_of(config):
        yield (
            f"schedule.warmup_tokens={warmup} reaches into the cooldown, which begins after "
            f"{largest} of the run's {length_of(config)} tokens "
            f"(schedule.cooldown_fraction={config.schedule.cooldown_fraction:g}), "
            "and the learning rate would drop at once: "
            f"set schedule.warmup_tokens={largest} or less"
        )


def conflicts(config: Config) -> Iterator[str]:
    """Yield a message for every broken rule between the keys of a run's config."""
    yield from data_conflicts(config.data)
    yield from setup_conflicts(config)
    model, parallel, train, method = config.model, config.parallel, config.train, config.method
    tp, cp, dp = (
        parallel.tensor_parallel_size,
        parallel.context_parallel_size,
        parallel.data_parallel_size,
    )
    parts = (tp if parallel.sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if config.data.seq_length % parts:
        keys = ["2 × parallel.context_parallel_size"] if cp > 1 else []
        if parallel.sequence_parallel or cp == 1:
            keys.append("parallel.tensor_parallel_size")
        yield (
            f"data.seq_length={config.data.seq_length} is not divisible by the {parts} parts that "
            f"{' × '.join(keys)} splits it into"
        )
    if config.fp8.attention and config.dropout.attention:
        yield (
            "fp8.attention=true cannot be combined with dropout.attention: "
            "set one of them to its default"
        )
    if config.fp8.attention and config.data.mask_documents:
        yield (
            "fp8.attention=true cannot be combined with data.mask_documents=true: "
            "set one of them to its default"
        )
    if cp > 1 and config.data.mask_documents:
        yield (
            "data.mask_documents=true cannot be combined with parallel.context_parallel_size > 1: "
            "set one of them to its default"
        )
    if train.global_batch_size % (train.micro_batch_size * dp):
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by "
            f"train.micro_batch_size × parallel.data_parallel_size = "
            f"{train.micro_batch_size} × {dp}"
        )
    elif parallel.virtual_pipeline_parallel_size > 1 and (
        batches := train.global_batch_size // (train.micro_batch_size * dp)
    ) % (pp := parallel.pipeline_parallel_size):
        yield (
            f"{batches} micro-batches a step are not divisible by "
            f"parallel.pipeline_parallel_size={pp}, as virtual_pipeline_parallel_size requires: "
            "change train.global_batch_size or train.micro_batch_size"
        )
    if config.data.seq_length > model.max_sequence_length:
        yield (
            f"data.seq_length={config.data.seq_length} exceeds "
            f"model.max_sequence_length={model.max_sequence_length}"
        )
    if config.steps < 1:
        yield (
            f"train.tokens={train.tokens} is less than one step of {config.tokens_per_step} tokens "
            "(global_batch_size × seq_length)"
        )
    elif not config.branch_of and config.schedule.warmup_tokens >= length_of(config):
        yield (
            f"schedule.warmup_tokens={config.schedule.warmup_tokens} is not less than the run's "
            f"{length_of(config)} tokens: set it to {largest_warmup(config)} or less"
        )
    if (steps := config.profile.steps) and not steps[0] <= steps[1] <= config.steps:
        yield (
            f"profile.steps={steps} must be a first and a last step, "
            f"at most {config.steps}, the run's last"
        )
    yield from _fp8_batch_conflicts(config)
    yield from _overlap_conflicts(config)
    yield from _branch_conflicts(config)
    yield from _schedule_conflicts(config.schedule)
    yield from _graph_conflicts(config)
    for tokens in config.checkpoint.milestones:
        if tokens > train.tokens:
            yield f"checkpoint.milestones: {tokens} is beyond train.tokens={train.tokens}"
    for name in config.evals.tasks if config.evals.tasks_dir else ():
        if name not in TASKS_WITH_FILES:
            known = ", ".join(TASKS_WITH_FILES)
            yield (
                f"evals.tasks.{name}: evals.tasks_dir has files of {known} only"
                f"{nearest(name, list(TASKS_WITH_FILES))}"
            )
    for name in ("humaneval", "mbpp"):
        if name in config.evals.inline_tasks:
            yield (
                f"evals.tasks.{name}.where=inline: generated programs are run by workers only; "
                "set it to worker"
            )
    for name in config.evals.learned or ():
        if name not in config.evals.heldout:
            known = ", ".join(config.evals.heldout) or "none"
            yield (
                f"evals.learned: {name} is not a domain of evals.heldout ({known})"
                f"{nearest(name, list(config.evals.heldout))}"
            )
    if "heldout" in config.evals.tasks:
        yield "evals.tasks.heldout: that name is taken by the held-out domains"
    if method.name == "lora" and config.init_from is None:
        yield "method.name=lora adapts a pretrained model: set init_from to the run folder of one"
