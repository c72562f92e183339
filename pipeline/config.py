"""A run's config, composed by Hydra from conf/ and checked as a whole against the schema before anything starts."""

import copy
import difflib
import functools
import json
import operator
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from retemper.pipeline.errors import UserError
from retemper.pipeline.flops import linear_layers
from retemper.pipeline.schema.base import Section
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.evals import TASKS_WITH_FILES
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.train import ScheduleConfig


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises UserError with every problem in one message: unknown keys (nearest valid key named), ill-typed values,
    and topologies that cannot be.
    """
    raw = _compose(overrides)
    if raw.get("init_from") and not any(text.startswith("model") for text in overrides):
        raw["model"] = _model_of_base(raw)
    return check_config(raw)


def _model_of_base(raw: dict[str, Any]) -> dict[str, Any]:
    """A run has the model that it begins from."""
    path = Path(raw["init_from"], "config.json")
    if not path.is_file():
        return raw["model"]
    config = json.loads(path.read_text())
    if "model" not in config:
        raise UserError(
            f"init_from={raw['init_from']} is no run folder. A transformers folder becomes one by "
            f"`retemper import {raw['init_from']} runs/models/NAME`; then init_from=runs/models/NAME"
        )
    return config["model"]


def load_data_config(overrides: list[str]) -> DataConfig:
    """The data section alone, for a corpus that no run is named for. Raises UserError."""
    raw = _compose(overrides)
    try:
        data = DataConfig.model_validate(raw["data"])
    except ValidationError as error:
        raise _report([_describe(problem, "data.") for problem in error.errors()]) from None
    if problems := list(_data_conflicts(data)):
        raise _report(problems)
    return data


def load_parallel(overrides: list[str]) -> ParallelConfig:
    """The parallel section alone. Raises UserError."""
    if strange := [text for text in overrides if not text.startswith("parallel")]:
        raise UserError(f"{strange[0]}: only parallel=… and parallel.… are given here")
    try:
        return ParallelConfig.model_validate(_compose(overrides)["parallel"])
    except ValidationError as error:
        raise _report([_describe(problem, "parallel.") for problem in error.errors()]) from None


# What may be said anew of a run that is evaluated, and of one that ranks of a launch evaluate, who need its inputs and a layout.
OF_EVALUATIONS = ("evals",)
OF_SCORING = (*OF_EVALUATIONS, "parallel", "train.micro_batch_size", "track", "init_from", "data.path", "data.tokenizer")
# Of its evaluations, what a preset leaves as it was: what the run has been scored on so far, and what fits its machine.
_KEPT = ("heldout", "max_samples", "micro_batch_size", "tasks_dir")


def load_run(run_dir: Path, overrides: list[str], may_change: tuple[str, ...] = OF_EVALUATIONS) -> Config:
    """The config of a run's folder, wherever that stands now, with keys as given here where they are. Raises UserError.

    may_change: the sections and keys that may be given.
    """
    if strange := [text for text in overrides if not any(_is_of(text, key) for key in may_change)]:
        raise UserError(f"{strange[0]}: the run's own config holds; what can be given anew is {', '.join(may_change)}")
    folder = Path(os.path.abspath(run_dir))
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.json; name runs_dir/study/name of a run that has begun")
    raw = json.loads(path.read_text())
    if "evals" not in raw:
        raise UserError(f"{run_dir} is an imported model, which no run has trained: name the folder of a run that begins from it")
    raw |= {"runs_dir": str(folder.parent.parent), "study": folder.parent.name, "name": folder.name}
    return check_config(_with_overrides(raw, overrides) if overrides else raw)


def _is_of(text: str, key: str) -> bool:
    """Whether an override sets a key, or one below it."""
    return re.match(rf"{re.escape(key)}[.=]", text) is not None


def _with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run's config with presets and single values in place of its own."""
    composed, changed = _compose(overrides), copy.deepcopy(raw)
    for section in ("evals", "parallel"):
        if presets := [text for text in overrides if text.startswith(f"{section}=")]:
            kept = {key: raw[section][key] for key in _KEPT} if section == "evals" else {}
            changed[section] = _compose(presets)[section] | kept
    for *sections, key in (text.partition("=")[0].split(".") for text in overrides):
        if sections or key not in ("evals", "parallel"):
            value, target = composed, changed
            for section in sections:
                value, target = value[section], target.setdefault(section, {})
            target[key] = value[key]
    return changed


def check_setup(setup: ModelSetup) -> ModelSetup:
    """Check a model against its layout. Raises UserError."""
    if problems := list(_setup_conflicts(setup)):
        raise _report(problems)
    return setup


def to_yaml(config: Config) -> str:
    """The resolved config as conf/ writes it."""
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def check_config(raw: dict[str, Any]) -> Config:
    """Check a plain dictionary against the schema and the rules between its keys. Raises UserError."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _report([*(_describe(problem) for problem in error.errors()), *_conflicts_beside(error, raw)]) from None
    if problems := list(_conflicts(config)):
        raise _report(problems)
    return config


def _conflicts_beside(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """The rules broken beside unknown keys; a value that is missing or ill-typed leaves nothing to check them on."""
    known = copy.deepcopy(raw)
    for problem in error.errors():
        if problem["type"] != "extra_forbidden":
            return []
        *path, key = problem["loc"]
        functools.reduce(operator.getitem, path, known).pop(key)
    return list(_conflicts(Config.model_validate(known)))


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ between two dumped configs, as "key: before -> after"."""
    changes = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return changes


def conf_dir() -> Path:
    """The folder of presets, wherever the package is installed."""
    from importlib.resources import files

    return Path(str(files("retemper.conf")))


def preset_names(group: str) -> list[str]:
    """The presets of one group of conf/, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


_EMPTIED = ("evals.heldout", "evals.tasks")  # Hydra merges {} into what is there


def _compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_")}
    _check_presets(overrides, groups)
    # Hydra stops at the first unknown key; added with ++ it reaches the schema, which reports all of them together.
    arguments = []
    for text in overrides:
        key, _, value = text.partition("=")
        if value == "{}" and key in _EMPTIED:
            arguments.append(f"~{key}")
        arguments.append(text if key in groups else f"++{text.lstrip('+')}")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return _without_unset(OmegaConf.to_container(compose("config", arguments), resolve=True, throw_on_missing=False))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"The configuration cannot be composed from {' '.join(overrides) or 'its defaults'}: {error}\n"
            "A value with special characters is quoted within the word, as 'key=\"a(b)=c\"'"
        ) from None


def _without_unset(section: dict[str, Any]) -> dict[str, Any]:
    """The values that are set: presets write ??? for those that the person must give."""
    return {key: _without_unset(value) if isinstance(value, dict) else value for key, value in section.items() if value != "???"}


def _check_presets(overrides: list[str], groups: set[str]) -> None:
    problems = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            problems.append(f"{text!r} is not key=value")
        elif key in groups and value not in preset_names(key):
            problems.append(f"{key}={value}: no such preset; there are {', '.join(preset_names(key))}{_nearest(value, preset_names(key))}")
    if problems:
        raise _report(problems)


def _report(problems: list[str]) -> UserError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError("\n".join([f"The configuration has {count}:", *(f"  - {problem}" for problem in problems)]))


def _describe(problem: dict[str, Any], prefix: str = "") -> str:
    key = prefix + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key, _schema_keys(Config))}"
    if problem["type"] == "missing":
        return f"{key}: has no value; set it as {key}=…"
    return f"{key}: {problem['msg']} (got {problem['input']!r})"


def _nearest(text: str, choices: list[str]) -> str:
    same_leaf = [choice for choice in choices if choice.split(".")[-1] == text.split(".")[-1]]
    matches = same_leaf[:1] or difflib.get_close_matches(text, choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _schema_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(kind)]
        keys += _schema_keys(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _data_conflicts(data: DataConfig):
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
    if sum(round(stream.fraction * data.mixture_window) for stream in streams.values()) >= data.mixture_window:
        yield "the fractions of data.mixture and data.replay leave nothing of the run's own corpus: their sum must be less than 1"


def _setup_conflicts(config: ModelSetup):
    """Yield every rule between a model and its layout that is broken."""
    model, parallel, method = config.model, config.parallel, config.method
    tp, pp, vpp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            yield f"parallel.tensor_parallel_size={tp} does not divide model.{key}={getattr(model, key)}"
    if model.num_layers % (pp * vpp):
        sizes = f"parallel.pipeline_parallel_size={pp}" + (f" × parallel.virtual_pipeline_parallel_size={vpp}" if vpp > 1 else "")
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
        yield "method.name=lora needs method.lora (rank, alpha, targets); take the preset method=lora"
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
_FP8_MULTIPLES = {"delayed": (16, 8), "tensorwise": (16, 8), "blockwise": (128, 128), "mxfp8": (32, 32)}


def fp8_token_multiple(config: ModelSetup) -> int:
    """What the tokens of a batch on a rank are a multiple of."""
    return _FP8_MULTIPLES[config.fp8_recipe][1] if config.fp8_recipe else 1


def _fp8_conflicts(config: ModelSetup):
    recipe, lora, tp = config.fp8_recipe, config.method.lora, config.parallel.tensor_parallel_size
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
    if config.fp8.bf16_layers and recipe == "delayed":
        yield "fp8.bf16_layers does not go with precision=fp8_delayed, whose scales are of the whole model: take fp8_tensorwise or 0"
    if config.fp8.bf16_layers > (of_stage := config.model.num_layers // config.parallel.pipeline_parallel_size):
        yield f"fp8.bf16_layers={config.fp8.bf16_layers} is more than the {of_stage} layers of a pipeline stage"
    multiple, _ = _FP8_MULTIPLES[recipe]
    out = {name: features_out // tp for name, (_, features_out) in linear_layers(config.model).items()}
    fused = {"hidden state": config.model.hidden_size, "q, k and v": out["q"] + out["k"] + out["v"], "q": out["q"], "gate": out["gate"]}
    for name, features in fused.items():
        if features % multiple:
            yield f"precision={config.precision} asks for features that {multiple} divides, but {name} has {features} on a rank"


def _fp8_batch_conflicts(config: Config):
    parallel, multiple = config.parallel, fp8_token_multiple(config)
    parts = parallel.context_parallel_size * (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
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
    if (config.train.branches or config.branch_of) and not (config.schedule.name == "trapezoid" and config.schedule.cooldown_fraction):
        yield "branches cool down from a constant rate: schedule=trapezoid with a schedule.cooldown_fraction above 0"
    for tokens, step in zip(config.train.branches, config.branch_steps, strict=True):
        if not 1 <= step <= config.steps:
            yield (
                f"train.branches: the cooldown of {tokens} begins after step {step}, but train.tokens={config.train.tokens} is {config.steps} "
                f"steps; a trunk reaches from 1 to the last of them"
            )


def _schedule_conflicts(schedule: ScheduleConfig):
    if schedule.name == "inverse_sqrt" and not schedule.warmup_tokens:
        yield "schedule.name=inverse_sqrt falls with sqrt(schedule.warmup_tokens / tokens): set schedule.warmup_tokens above 0"
    if schedule.name != "trapezoid" and schedule.cooldown_fraction:
        yield f"schedule.cooldown_fraction is the trapezoid's alone: set it to 0 with schedule.name={schedule.name}, or take schedule=trapezoid"


def _conflicts(config: Config):
    """Yield every rule between keys that the config breaks."""
    yield from _data_conflicts(config.data)
    yield from _setup_conflicts(config)
    model, parallel, train, method = config.model, config.parallel, config.train, config.method
    tp, cp, dp = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.data_parallel_size
    parts = (tp if parallel.sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if config.data.seq_length % parts:
        yield (
            f"data.seq_length={config.data.seq_length} is not divisible by the {parts} parts that "
            f"{'2 × parallel.context_parallel_size' if cp > 1 else 'parallel.tensor_parallel_size'}"
            f"{' × parallel.tensor_parallel_size' if cp > 1 and parallel.sequence_parallel else ''} makes of it"
        )
    if cp > 1 and config.data.mask_documents:
        yield "data.mask_documents=true does not go with parallel.context_parallel_size > 1; set one of them to its default"
    if train.global_batch_size % (train.micro_batch_size * dp):
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size × "
            f"parallel.data_parallel_size = {train.micro_batch_size} × {dp}"
        )
    elif parallel.virtual_pipeline_parallel_size > 1 and (batches := train.global_batch_size // (train.micro_batch_size * dp)) % (
        pp := parallel.pipeline_parallel_size
    ):
        yield (
            f"{batches} micro-batches a step are not divisible by parallel.pipeline_parallel_size={pp}, as virtual_pipeline_parallel_size "
            "asks: change train.global_batch_size or train.micro_batch_size"
        )
    if config.data.seq_length > model.max_sequence_length:
        yield f"data.seq_length={config.data.seq_length} exceeds model.max_sequence_length={model.max_sequence_length}"
    if config.steps < 1:
        yield f"train.tokens={train.tokens} is less than one step of {config.tokens_per_step} tokens (global_batch_size × seq_length)"
    elif not config.branch_of and config.schedule.warmup_tokens >= config.steps * config.tokens_per_step:
        yield f"schedule.warmup_tokens={config.schedule.warmup_tokens} is not less than the run's {config.steps * config.tokens_per_step} tokens"
    if (steps := config.profile.steps) and not steps[0] <= steps[1] <= config.steps:
        yield f"profile.steps={steps} are a first and a last step, at most {config.steps}, the run's last"
    yield from _fp8_batch_conflicts(config)
    yield from _overlap_conflicts(config)
    yield from _branch_conflicts(config)
    yield from _schedule_conflicts(config.schedule)
    for tokens in config.checkpoint.milestones:
        if tokens > train.tokens:
            yield f"checkpoint.milestones: {tokens} is beyond train.tokens={train.tokens}"
    for name in config.evals.tasks if config.evals.tasks_dir else ():
        if name not in TASKS_WITH_FILES:
            known = ", ".join(TASKS_WITH_FILES)
            yield f"evals.tasks.{name}: evals.tasks_dir has files of {known} only{_nearest(name, list(TASKS_WITH_FILES))}"
    for name in ("humaneval", "mbpp"):
        if name in config.evals.inline:
            yield f"evals.tasks.{name}.where=inline: generated programs are run by workers alone; set it to worker"
    if "heldout" in config.evals.tasks:
        yield "evals.tasks.heldout: that name is taken by the held-out domains"
    if method.name == "lora" and config.init_from is None:
        yield "method.name=lora adapts a pretrained model: set init_from to the run folder of one"
