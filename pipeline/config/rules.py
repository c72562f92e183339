"""The rules between a configuration's keys: each that is broken, in a sentence that says what to change."""

import math

from retemper.pipeline.config.schedules import largest_warmup, length_of
from retemper.pipeline.errors import nearest
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.evals import TASKS_WITH_FILES
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.shapes import linear_layers
from retemper.pipeline.schema.train import ScheduleConfig


def data_conflicts(data: DataConfig):
    """Yield every rule between the keys of a corpus that it breaks."""
    if data.executor == "slurm" and data.slurm is None:
        yield "data.executor=slurm needs data.slurm.partition=NAME"
    if data.source.prompt is not None and data.source.kind != "rows":
        yield f"data.source.prompt takes columns of rows, but data.source.kind={data.source.kind}"
    if "\\n" in (data.source.prompt or ""):
        yield (
            "data.source.prompt holds a backslash and an n, which is no line break: "
            "on the command line write $'data.source.prompt=\"Q: {ask}\\nA: \"', with the dollar before the quotes"
        )
    if data.tokens is not None and data.tokens < data.seq_length:
        yield f"data.tokens={data.tokens} is less than one sample of data.seq_length={data.seq_length}"
    if "://" in data.path and not data.path.startswith(("s3://", "gs://")):
        yield f"data.path={data.path}: shards are written to a folder, s3:// or gs://"
    yield from _mixture_conflicts(data)


def _mixture_conflicts(data: DataConfig):
    streams = data.mixture | ({"replay": data.replay} if data.replay else {})
    for name in {data.name, "replay"} & data.mixture.keys():
        yield f"data.mixture.{name}: that name is taken; give this corpus another"
    for name, stream in streams.items():
        samples = stream.fraction * data.mixture_window
        if abs(samples - round(samples)) > 1e-6 or not round(samples):
            yield (
                f"the fraction {stream.fraction} of {name} is no whole number of samples of data.mixture_window={data.mixture_window}; "
                "round it, or take a longer window"
            )
    if (
        sum(round(stream.fraction * data.mixture_window) for stream in streams.values())
        >= data.mixture_window
    ):
        yield "the fractions of data.mixture and data.replay leave nothing of the run's own corpus: their sum must be less than 1"


def setup_conflicts(config: ModelSetup):
    """Yield every rule between a model and its layout that is broken."""
    model, parallel, method = config.model, config.parallel, config.method
    tp, pp, vpp = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_parallel_size,
    )
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            yield f"parallel.tensor_parallel_size={tp} does not divide model.{key}={getattr(model, key)}"
    if model.num_layers % (pp * vpp):
        sizes = f"parallel.pipeline_parallel_size={pp}" + (
            f" × parallel.virtual_pipeline_parallel_size={vpp}" if vpp > 1 else ""
        )
        yield f"{sizes} does not divide model.num_layers={model.num_layers}"
    if vpp > 1 and pp == 1:
        yield f"parallel.virtual_pipeline_parallel_size={vpp} needs parallel.pipeline_parallel_size > 1"
    if model.head_size is None and model.hidden_size % model.num_attention_heads:
        yield f"model.num_attention_heads={model.num_attention_heads} does not divide model.hidden_size={model.hidden_size}"
    elif model.kv_channels % 2:
        yield f"the head size is {model.kv_channels} (model.head_size, or hidden_size / num_attention_heads); rotary positions need an even one"
    if model.num_attention_heads % model.num_query_groups:
        yield f"model.num_query_groups={model.num_query_groups} does not divide model.num_attention_heads={model.num_attention_heads}"
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_parallel_size > 1"
    if method.name == "lora" and method.lora is None:
        yield "method.name=lora needs method.lora (rank, targets); take the preset method=lora"
    if method.lora and method.lora.alpha is None:
        scaled_by_two = f"{2 * math.sqrt(method.lora.rank):.6g}"
        yield (
            "method.lora.rslora=true scales by alpha / sqrt(rank), which has no usual alpha: "
            f"set method.lora.alpha; with method.lora.rank={method.lora.rank} "
            f"method.lora.alpha={scaled_by_two} gives a scale of 2"
        )
    if method.lora and method.lora.dora and method.lora.dropout:
        yield "method.lora.dora=true takes no method.lora.dropout: a row's norm stands for the whole input; set one of them to its default"
    if method.name == "full" and method.lora is not None:
        yield "method.name=full trains every weight, but method.lora is set; take the preset method=lora or set method.lora=null"
    if parallel.tensor_parallel_overlap and not parallel.sequence_parallel:
        yield "parallel.tensor_parallel_overlap=true needs parallel.sequence_parallel=true"
    if parallel.tensor_parallel_overlap and config.precision in ("fp32", "fp8_blockwise"):
        yield f"parallel.tensor_parallel_overlap=true does not go with precision={config.precision}: set it to false"
    yield from _fp8_conflicts(config)


# What Transformer Engine's kernels ask of sizes: in features, and in tokens of a micro-batch.
_FP8_MULTIPLES = {
    "delayed": (16, 8),
    "tensorwise": (16, 8),
    "blockwise": (128, 128),
    "mxfp8": (32, 32),
}


def fp8_token_multiple(config: ModelSetup) -> int:
    """What the tokens of a batch on a rank are a multiple of."""
    return _FP8_MULTIPLES[config.fp8_recipe][1] if config.fp8_recipe else 1


def _fp8_conflicts(config: ModelSetup):
    recipe = config.fp8_recipe
    lora = config.method.lora
    tp = config.parallel.tensor_parallel_size
    if recipe is None:
        if config.fp8 != type(config.fp8)():
            yield f"fp8.* is set, but precision={config.precision}: take precision=fp8_delayed, fp8_tensorwise, fp8_blockwise or mxfp8"
        return
    if lora and (lora.dora or lora.pissa):
        yield f"precision={config.precision} takes no method.lora.dora or pissa: both compute with the base's weights, which FP8 rounds"
    if lora and recipe == "delayed":
        yield "precision=fp8_delayed would round the frozen base with scales of steps that have not been: take fp8_tensorwise with method=lora"
    if lora and config.fp8.param_gather:
        yield "fp8.param_gather=true is of full training: with method=lora the base is held in FP8 anyway"
    if config.fp8.param_gather and recipe == "mxfp8":
        yield "fp8.param_gather=true does not go with precision=mxfp8: leave it out"
    if config.fp8.keep_transposed and not (lora and recipe == "tensorwise"):
        yield "fp8.keep_transposed=true is of method=lora with precision=fp8_tensorwise: other weights keep both orders anyway"
    if config.fp8.attention and recipe not in ("delayed", "tensorwise"):
        yield f"fp8.attention=true goes with precision=fp8_tensorwise or fp8_delayed, not with {config.precision}"
    if config.fp8.bf16_layers and recipe == "delayed":
        yield "fp8.bf16_layers does not go with precision=fp8_delayed, whose scales are of the whole model: take fp8_tensorwise or 0"
    if config.fp8.bf16_layers > (
        of_stage := config.model.num_layers // config.parallel.pipeline_parallel_size
    ):
        yield f"fp8.bf16_layers={config.fp8.bf16_layers} is more than the {of_stage} layers of a pipeline stage"
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
            yield f"precision={config.precision} asks for features that {multiple} divides, but {name} has {features} on a rank"


def _fp8_batch_conflicts(config: Config):
    parallel = config.parallel
    multiple = fp8_token_multiple(config)
    parts = parallel.context_parallel_size * (
        parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    )
    tokens = config.train.micro_batch_size * config.data.seq_length // parts
    if tokens % multiple:
        yield (
            f"precision={config.precision} asks for micro-batches whose tokens {multiple} divides; train.micro_batch_size and data.seq_length "
            f"give a rank {tokens}"
        )
    elif config.evals.heldout and config.data.seq_length // parts % multiple:
        yield (
            f"precision={config.precision} asks for a data.seq_length of which a rank has a multiple of {multiple} tokens, for held-out samples "
            f"come in any number; here it has {config.data.seq_length // parts}"
        )


def _overlap_conflicts(config: Config):
    train, evals = config.train, config.evals
    if not (config.parallel.tensor_parallel_overlap and evals.heldout):
        return
    together = train.micro_batch_size * config.parallel.data_parallel_size
    if evals.micro_batch_size != train.micro_batch_size or evals.max_samples % together:
        yield (
            f"parallel.tensor_parallel_overlap=true has buffers for micro-batches of one size: set evals.micro_batch_size={train.micro_batch_size} "
            f"and evals.max_samples to a multiple of {together}, or evals.heldout={{}}"
        )


def _branch_conflicts(config: Config):
    if config.train.branches and config.branch_of:
        yield "train.branches: a branch has none of its own; leave branch_of or train.branches out"
    if (config.train.branches or config.branch_of) and not (
        config.schedule.name == "trapezoid" and config.schedule.cooldown_fraction
    ):
        yield "branches cool down from a constant rate: schedule=trapezoid with a schedule.cooldown_fraction above 0"
    for tokens, step in zip(config.train.branches, config.branch_steps, strict=True):
        if not 1 <= step <= config.steps:
            yield (
                f"train.branches: the cooldown of {tokens} begins after step {step}, but train.tokens={config.train.tokens} is {config.steps} "
                f"steps; a trunk reaches from 1 to the last of them"
            )


def graph_conflicts(config: Config):
    """Yield every reason why a micro-batch's passes cannot be recorded as a CUDA graph (model/graph.py)."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size > 1:
        yield "parallel.pipeline_parallel_size > 1: stages wait for each other between kernels"
    if config.data.mask_documents:
        yield "data.mask_documents=true: the shapes of attention change with the documents"
    if parallel.overlap or parallel.tensor_parallel_overlap:
        yield "parallel.overlap and tensor_parallel_overlap start communication from the host"
    if config.precision == "fp8_delayed" or config.fp8.param_gather:
        yield "precision=fp8_delayed and fp8.param_gather=true keep on the host which scales and weights are new"


def _graph_conflicts(config: Config):
    if config.train.cuda_graph == "on":
        for reason in graph_conflicts(config):
            yield f"train.cuda_graph=on does not go with {reason}; take auto"


def _schedule_conflicts(schedule: ScheduleConfig):
    if schedule.name == "inverse_sqrt" and not schedule.warmup_tokens:
        yield "schedule.name=inverse_sqrt falls with sqrt(schedule.warmup_tokens / tokens): set schedule.warmup_tokens above 0"
    if schedule.name != "trapezoid" and schedule.cooldown_fraction:
        yield f"schedule.cooldown_fraction is the trapezoid's alone: set it to 0 with schedule.name={schedule.name}, or take schedule=trapezoid"


def beginning_conflicts(config: Config):
    """Yield what a run must not begin with; one that has begun with it goes on and is read."""
    warmup = config.schedule.warmup_tokens
    largest = largest_warmup(config)
    if not config.branch_of and largest < warmup < length_of(config):
        yield (
            f"schedule.warmup_tokens={warmup} reaches into the cooldown, which begins after {largest} "
            f"of the run's {length_of(config)} tokens "
            f"(schedule.cooldown_fraction={config.schedule.cooldown_fraction:g}), "
            f"and the rate would fall at once: set schedule.warmup_tokens={largest} or less"
        )


def conflicts(config: Config):
    """Yield every rule between keys that the config breaks."""
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
        yield (
            f"data.seq_length={config.data.seq_length} is not divisible by the {parts} parts that "
            f"{'2 × parallel.context_parallel_size' if cp > 1 else 'parallel.tensor_parallel_size'}"
            f"{' × parallel.tensor_parallel_size' if cp > 1 and parallel.sequence_parallel else ''} makes of it"
        )
    if config.fp8.attention and config.data.mask_documents:
        yield "fp8.attention=true does not go with data.mask_documents=true; set one of them to its default"
    if cp > 1 and config.data.mask_documents:
        yield "data.mask_documents=true does not go with parallel.context_parallel_size > 1; set one of them to its default"
    if train.global_batch_size % (train.micro_batch_size * dp):
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size × "
            f"parallel.data_parallel_size = {train.micro_batch_size} × {dp}"
        )
    elif parallel.virtual_pipeline_parallel_size > 1 and (
        batches := train.global_batch_size // (train.micro_batch_size * dp)
    ) % (pp := parallel.pipeline_parallel_size):
        yield (
            f"{batches} micro-batches a step are not divisible by parallel.pipeline_parallel_size={pp}, as virtual_pipeline_parallel_size "
            "asks: change train.global_batch_size or train.micro_batch_size"
        )
    if config.data.seq_length > model.max_sequence_length:
        yield f"data.seq_length={config.data.seq_length} exceeds model.max_sequence_length={model.max_sequence_length}"
    if config.steps < 1:
        yield f"train.tokens={train.tokens} is less than one step of {config.tokens_per_step} tokens (global_batch_size × seq_length)"
    elif not config.branch_of and config.schedule.warmup_tokens >= length_of(config):
        yield (
            f"schedule.warmup_tokens={config.schedule.warmup_tokens} is not less than the run's "
            f"{length_of(config)} tokens: set it to {largest_warmup(config)} or less"
        )
    if (steps := config.profile.steps) and not steps[0] <= steps[1] <= config.steps:
        yield f"profile.steps={steps} are a first and a last step, at most {config.steps}, the run's last"
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
            yield f"evals.tasks.{name}: evals.tasks_dir has files of {known} only{nearest(name, list(TASKS_WITH_FILES))}"
    for name in ("humaneval", "mbpp"):
        if name in config.evals.inline:
            yield f"evals.tasks.{name}.where=inline: generated programs are run by workers alone; set it to worker"
    for name in config.evals.learned or ():
        if name not in config.evals.heldout:
            known = ", ".join(config.evals.heldout) or "none"
            yield (
                f"evals.learned: {name} is no domain of evals.heldout ({known})"
                f"{nearest(name, list(config.evals.heldout))}"
            )
    if "heldout" in config.evals.tasks:
        yield "evals.tasks.heldout: that name is taken by the held-out domains"
    if method.name == "lora" and config.init_from is None:
        yield "method.name=lora adapts a pretrained model: set init_from to the run folder of one"
