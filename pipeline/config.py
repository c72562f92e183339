"""What a run is: one strict schema, composed by Hydra from conf/ and checked as a whole before anything starts."""

import copy
import difflib
import functools
import json
import operator
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from retemper.pipeline.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: Any) -> int:
    """Read a token count: an integer, or a number with K, M, B or T (powers of 1000), as "0.25B"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a token count is an integer, or a number with K, M, B or T, as 0.25B")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)\s*([KMBT]?)\s*", str(value))
    if not match:
        raise ValueError(f"{value!r} is no token count: write an integer, or a number with K, M, B or T, as 0.25B")
    return round(float(match[1]) * _UNITS[match[2]])


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt = Field(description="key/value heads; equal to num_attention_heads without GQA")
    vocab_size: PositiveInt = Field(description="of the tokenizer; padding for tensor parallelism is added on top")
    max_sequence_length: PositiveInt
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    init_std: float = Field(0.02, description="of the normal initialisation; output projections get 1/sqrt(2 layers) of it")
    tie_embeddings: bool = False


class SourceConfig(_Section):
    """Where documents come from."""

    kind: Literal["rows", "text", "docstrings"] = Field(
        description="rows: one document a row of jsonl (plain, .gz, .zst) or parquet; text: one a file; docstrings: one a Python module"
    )
    path: str = Field(
        description="a folder or file, also s3://, gs://, hf://datasets/OWNER/NAME/FOLDER; stdlib: this Python's standard library; package:NAME an installed package"
    )
    revision: str = Field("main", description="of a hub source: branch, tag or commit; the commit it stands for is pinned and recorded")
    glob: str | None = Field(None, description="which files below a folder; by default what the kind's name says")
    exclude: list[str] = Field(default=[], description="names of files and folders left out")
    text_key: str = Field("text", description="the column of rows that is trained on")
    prompt: str | None = Field(
        None, description="instruction pairs: what stands before the text, without loss; {column} is replaced by that column of the row"
    )
    metadata_keys: list[str] = Field(default=[], description="columns that reports quote beside a document")


class CleanConfig(_Section):
    """What is left out of a corpus; every rule counts what it dropped."""

    min_chars: Annotated[int, Field(ge=1)] = Field(1, description="shorter documents, surrounding whitespace aside, are dropped")
    max_chars: PositiveInt | None = Field(None, description="longer documents are dropped; null keeps any length")
    nul_bytes: bool = Field(True, description="drop documents with NUL characters")
    generated: bool = Field(False, description="drop code that says in its first lines that a program wrote it")
    minified: bool = Field(False, description="drop code with lines longer than 1000 characters, or 100 on average")
    duplicates: bool = Field(True, description="keep one of the documents with the same content")
    invalid_utf8: Literal["drop", "replace"] = Field("drop", description="replace puts U+FFFD where bytes are no UTF-8")


class DecontaminateConfig(_Section):
    """Which evaluation problems must not be in the corpus: documents that share an n-gram of words with one are dropped."""

    tasks: dict[str, str] = Field(
        min_length=1, description="task name -> file or folder of its problems, jsonl or parquet, local or remote"
    )
    ngram: Annotated[int, Field(ge=4, le=64)] = Field(13, description="words, in lower case and without punctuation")


class SlurmConfig(_Section):
    """What sbatch is told."""

    partition: str
    time: str = Field("24:00:00", description="limit of one job of the array")
    mem_per_cpu_gb: PositiveInt = 4
    sbatch_args: dict[str, str] = Field(default={}, description="further options, as account: physics")


class DataConfig(_Section):
    """One corpus: the documents it is made of and the folder of token shards it becomes."""

    name: str
    path: str = Field(
        description="folder of the token shards: written by `retemper tokenize`, also to s3:// and gs://; training reads local ones so far"
    )
    work_dir: str | None = Field(
        None,
        description="where the folder NAME.partial of intermediate files stands until the end; by default beside path, for a remote path here",
    )
    tokenizer: str = Field(description="folder of a transformers fast tokenizer, or its hub name, as owner/name@revision")
    bos: bool = Field(False, description="begin each document with the tokenizer's begin-of-text")
    eos: bool = Field(True, description="end each document with the tokenizer's end-of-text")
    seq_length: PositiveInt = Field(description="tokens per sample")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="concat: documents joined and cut at seq_length; best_fit: padded, no document cut unless it is longer"
    )
    tokens: Tokens | None = Field(None, description="training tokens, rounded down to whole samples; null takes all documents")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(17, description="of the order of documents, and so of the choice for `tokens`")
    source: SourceConfig
    clean: CleanConfig = CleanConfig()
    decontaminate: DecontaminateConfig | None = None
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="documents kept out of training, chosen by content hash"
    )
    compression: Literal["zstd"] | None = Field(None, description="of the shards")
    allow_broken_files: bool = Field(False, description="keep what could be read of damaged files instead of stopping at the end")
    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: PositiveInt | None = Field(None, description="processes that tokenize at once; null takes every core")
    slurm: SlurmConfig | None = None


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


class LoraConfig(_Section):
    """Canonical low-rank adapters, one A and B for each linear layer, as peft has them."""

    rank: PositiveInt
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[LoraTarget] = Field(min_length=1)


class MethodConfig(_Section):
    """Which weights train."""

    name: Literal["full", "lora"]
    lora: LoraConfig | None = None


class ParallelConfig(_Section):
    """How one model and one batch are spread over ranks; world size is the product of the four sizes."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.data_parallel_size


class OptimizerConfig(_Section):
    """AdamW with decoupled weight decay; biases and norms are not decayed."""

    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0 switches clipping off")


class ScheduleConfig(_Section):
    """The learning rate over tokens. trapezoid: linear warm-up, constant, linear cooldown; cosine: warm-up, half cosine."""

    name: Literal["trapezoid", "cosine"]
    warmup_tokens: Tokens
    cooldown_fraction: Fraction = Field(0.2, description="of train.tokens; the last part of the trapezoid")
    min_lr_ratio: Fraction = Field(0.0, description="final learning rate as a fraction of the peak")


class TrainConfig(_Section):
    """The amount and shape of training."""

    tokens: Tokens = Field(description="length of the run; rounded down to whole steps")
    global_batch_size: PositiveInt = Field(description="samples per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(description="samples per forward pass of one rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    log_every_steps: PositiveInt = 10


class CheckpointConfig(_Section):
    """When the run is saved, beside its end."""

    save_every_steps: Annotated[int, Field(ge=0)] = Field(0, description="for restarts; 0 saves at milestones only")
    milestones: list[Tokens] = Field(default=[], description="saved and evaluated")


class EvalsConfig(_Section):
    """What is measured at each milestone."""

    heldout: dict[str, str] = Field(default={}, description="domain name -> token-shard folder, for bits per byte")
    max_samples: PositiveInt = Field(512, description="held-out samples read per domain")
    micro_batch_size: PositiveInt = 16


class TrackConfig(_Section):
    """Where metrics are mirrored; runs/<study>/<name>/metrics.jsonl is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "retemper"


class Config(_Section):
    """One run."""

    study: str = Field(pattern=r"^\w[\w.-]*$", description="the experiment this run belongs to; the W&B group")
    name: str = Field(pattern=r"^\w[\w.-]*$", description="of the run; its folder is runs_dir/study/name")
    runs_dir: str = "runs"
    init_from: str | None = Field(None, description="run folder whose newest checkpoint gives the initial weights")
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    evals: EvalsConfig
    track: TrackConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir, self.study, self.name)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.seq_length

    @property
    def steps(self) -> int:
        return self.train.tokens // self.tokens_per_step

    @property
    def milestone_steps(self) -> list[int]:
        """Steps after which a milestone's checkpoint is saved and evaluated; the last step is always one."""
        return sorted({min(max(1, tokens // self.tokens_per_step), self.steps) for tokens in self.checkpoint.milestones} | {self.steps})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2)


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises UserError with every problem in one message: unknown keys (nearest valid key named), ill-typed values,
    and topologies that cannot be.
    """
    return check_config(_compose(overrides))


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


def _compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_")}
    _check_presets(overrides, groups)
    # Hydra stops at the first unknown key; added with ++ it reaches the schema, which reports all of them together.
    arguments = [text if text.split("=")[0] in groups else f"++{text.lstrip('+')}" for text in overrides]
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
    return isinstance(kind, type) and issubclass(kind, _Section)


def _data_conflicts(data: DataConfig):
    """Yield every rule between the keys of a corpus that it breaks."""
    if data.executor == "slurm" and data.slurm is None:
        yield "data.executor=slurm needs data.slurm.partition=NAME"
    if data.source.prompt is not None and data.source.kind != "rows":
        yield f"data.source.prompt takes columns of rows, but data.source.kind={data.source.kind}"
    if data.tokens is not None and data.tokens < data.seq_length:
        yield f"data.tokens={data.tokens} is less than one sample of data.seq_length={data.seq_length}"
    if "://" in data.path and not data.path.startswith(("s3://", "gs://")):
        yield f"data.path={data.path}: shards are written to a folder, s3:// or gs://"


def _conflicts(config: Config):
    """Yield every rule between keys that the config breaks."""
    yield from _data_conflicts(config.data)
    model, parallel, train, method = config.model, config.parallel, config.train, config.method
    tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            yield f"parallel.tensor_parallel_size={tp} does not divide model.{key}={getattr(model, key)}"
    if model.num_layers % pp:
        yield f"parallel.pipeline_parallel_size={pp} does not divide model.num_layers={model.num_layers}"
    if model.hidden_size % model.num_attention_heads:
        yield f"model.num_attention_heads={model.num_attention_heads} does not divide model.hidden_size={model.hidden_size}"
    elif model.hidden_size // model.num_attention_heads % 2:
        yield f"model.hidden_size / model.num_attention_heads = {model.hidden_size // model.num_attention_heads} is odd; rotary positions need an even head size"
    if model.num_attention_heads % model.num_query_groups:
        yield f"model.num_query_groups={model.num_query_groups} does not divide model.num_attention_heads={model.num_attention_heads}"
    if parallel.context_parallel_size > 1:
        yield "parallel.context_parallel_size > 1 needs Transformer Engine's attention, which build_model does not use yet; set it to 1"
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_parallel_size > 1"
    if parallel.sequence_parallel and config.data.seq_length % tp:
        yield f"parallel.tensor_parallel_size={tp} does not divide data.seq_length={config.data.seq_length}, as sequence_parallel asks"
    if train.global_batch_size % (train.micro_batch_size * dp):
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size × "
            f"parallel.data_parallel_size = {train.micro_batch_size} × {dp}"
        )
    if config.data.seq_length > model.max_sequence_length:
        yield f"data.seq_length={config.data.seq_length} exceeds model.max_sequence_length={model.max_sequence_length}"
    if config.steps < 1:
        yield f"train.tokens={train.tokens} is less than one step of {config.tokens_per_step} tokens (global_batch_size × seq_length)"
    elif config.schedule.warmup_tokens >= config.steps * config.tokens_per_step:
        yield f"schedule.warmup_tokens={config.schedule.warmup_tokens} is not less than the run's {config.steps * config.tokens_per_step} tokens"
    for tokens in config.checkpoint.milestones:
        if tokens > train.tokens:
            yield f"checkpoint.milestones: {tokens} is beyond train.tokens={train.tokens}"
    if method.name == "lora" and method.lora is None:
        yield "method.name=lora needs method.lora (rank, alpha, targets); take the preset method=lora"
    if method.name == "full" and method.lora is not None:
        yield "method.name=full trains every weight, but method.lora is set; take the preset method=lora or set method.lora=null"
    if method.name == "lora" and config.init_from is None:
        yield "method.name=lora adapts a pretrained model: set init_from to the run folder of one"
