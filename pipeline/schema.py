"""The keys of a run and of a corpus: one strict schema, each field with what it means."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: Any) -> int:
    """Read a token count: an integer, or a number with K, M, B or T (powers of 1000), as "0.25B"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a token count is an integer, or a number with K, M, B or T, as 0.25B")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)\s*([KMBT]?)\s*", str(value))
    if not match:
        raise ValueError(f"{value!r} is no token count: write an integer, or a number with K, M, B or T, as 0.25B")
    return round(float(match[1]) * _UNITS[match[2]])


def format_tokens(tokens: int) -> str:
    """A token count as short as it can be written without loss: 250M, 1B, 81920."""
    unit = max((unit for unit, size in _UNITS.items() if tokens % size == 0), key=_UNITS.get)
    return f"{tokens // _UNITS[unit]}{unit}"


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # becomes part of paths
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class RopeScaling(Section):
    """How rotary frequencies are stretched for longer sequences than the model was first trained on."""

    kind: Literal["linear", "llama3"] = Field(description="linear: all divided by factor; llama3: the slow ones, as Llama 3.1 does")
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_sequence_length: PositiveInt = 8192


class ModelConfig(Section):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt = Field(description="key/value heads; equal to num_attention_heads without GQA")
    vocab_size: PositiveInt = Field(description="of the tokenizer; padding for tensor parallelism is added on top")
    max_sequence_length: PositiveInt
    head_size: PositiveInt | None = Field(None, description="by default hidden_size / num_attention_heads")
    qkv_bias: bool = Field(False, description="of the query, key and value projections, as Qwen 2 has it")
    qk_norm: bool = Field(False, description="RMSNorm of each head's query and key, as Qwen 3 has it")
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    init_std: float = Field(0.02, description="of the normal initialisation; output projections get 1/sqrt(2 layers) of it")
    tie_embeddings: bool = False

    @property
    def kv_channels(self) -> int:
        """Features of one head."""
        return self.head_size or self.hidden_size // self.num_attention_heads


class SourceConfig(Section):
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


class CleanConfig(Section):
    """What is left out of a corpus; every rule counts what it dropped."""

    min_chars: Annotated[int, Field(ge=1)] = Field(1, description="shorter documents, surrounding whitespace aside, are dropped")
    max_chars: PositiveInt | None = Field(None, description="longer documents are dropped; null keeps any length")
    nul_bytes: bool = Field(True, description="drop documents with NUL characters")
    generated: bool = Field(False, description="drop code that says in its first lines that a program wrote it")
    minified: bool = Field(False, description="drop code with lines longer than 1000 characters, or 100 on average")
    duplicates: bool = Field(True, description="keep one of the documents with the same content")
    invalid_utf8: Literal["drop", "replace"] = Field("drop", description="replace puts U+FFFD where bytes are no UTF-8")


class DecontaminateConfig(Section):
    """Which evaluation problems must not be in the corpus: documents that share an n-gram of words with one are dropped."""

    tasks: dict[str, str] = Field(
        min_length=1, description="task name -> file or folder of its problems, jsonl or parquet, local or remote"
    )
    ngram: Annotated[int, Field(ge=4, le=64)] = Field(13, description="words, in lower case and without punctuation")


class SlurmConfig(Section):
    """What sbatch is told."""

    partition: str
    time: str = Field("24:00:00", description="limit of one job of the array")
    mem_per_cpu_gb: PositiveInt = 4
    sbatch_args: dict[str, str] = Field(default={}, description="further options, as account: physics")


class CorpusConfig(Section):
    """One corpus: the documents it is made of and the folder of token shards it becomes."""

    name: Name
    path: str = Field(description="folder of the token shards, also s3:// and gs://: written by `retemper tokenize`, read by training")
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


class StreamConfig(Section):
    """A corpus mixed into the run's own."""

    path: str = Field(description="folder of its token shards, also s3:// and gs://")
    fraction: float = Field(gt=0, lt=1, description="of all training samples")


class DataConfig(CorpusConfig):
    """The corpus of a run, what is mixed into it, and how training reads them."""

    mixture: dict[Name, StreamConfig] = Field(default={}, description="further corpora by name; the run's own corpus takes the rest")
    replay: StreamConfig | None = Field(None, description="a corpus like what the base model knew, against forgetting")
    mixture_window: PositiveInt = Field(100, description="samples over which every corpus comes exactly at its fraction")
    mask_documents: bool = Field(False, description="attention stays within a document, and positions begin anew in each")
    cache_dir: str | None = Field(
        None, description="folder of each node's own disk for shards fetched or unpacked, kept after the run; by default the run's folder"
    )
    bad_shards: Literal["stop", "skip"] = Field(
        "stop", description="what a shard means that is damaged at its source: the end of the run, or its samples left out and recorded"
    )
    allow_change: bool = Field(False, description="let a run go on with other data than it began with; the switch is recorded")
    ledger: bool = Field(False, description="record the samples of every step, for `retemper data verify`")


LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
_TARGETS: dict[str, list[LoraTarget]] = {"attention": ["q", "k", "v", "o"], "mlp": ["gate", "up", "down"]}
_TARGETS["all"] = _TARGETS["attention"] + _TARGETS["mlp"]


def _listed(targets: Any) -> Any:
    """all, attention and mlp as the layers that they are."""
    if isinstance(targets, str):
        if targets not in _TARGETS:
            raise ValueError(f"targets are all, attention, mlp, or a list as [q,v]; got {targets!r}")
        return _TARGETS[targets]
    return targets


class LoraConfig(Section):
    """Canonical low-rank adapters, one A and B for each linear layer, as peft has them."""

    rank: PositiveInt
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(False, description="train the norm of each weight row apart from its direction")
    pissa: bool = Field(False, description="begin with the principal part of each weight instead of zero")
    lr_ratio: float = Field(1.0, ge=1, description="learning rate of B over that of A, as LoRA+ has it")
    targets: Annotated[list[LoraTarget], BeforeValidator(_listed)] = Field(
        min_length=1, description="all, attention (q, k, v, o), mlp (gate, up, down), or a list of them, as [q,v]"
    )


class MethodConfig(Section):
    """Which weights train."""

    name: Literal["full", "lora"]
    lora: LoraConfig | None = None


class ParallelConfig(Section):
    """How one model and one batch are spread over ranks; world size is the product of the four sizes."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt = Field(
        1, description="stages that each pipeline rank holds, interleaved for a shorter bubble"
    )
    context_parallel_size: PositiveInt = Field(1, description="ranks that share the tokens of every sequence")
    data_parallel_size: PositiveInt = 1
    sequence_parallel: bool = Field(
        False, description="tensor-parallel ranks share the tokens where they would repeat work: norms, residuals"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward pass instead of kept: selective those of feed-forward layers, full all",
    )
    overlap: bool = Field(
        False,
        description="gradients are reduced during the backward pass, weights gathered during the forward pass and, with virtual stages, "
        "activations sent beside computation",
    )
    tensor_parallel_overlap: bool = Field(
        False, description="tensor-parallel communication beside matrix multiplications; Transformer Engine's, with sequence_parallel"
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.data_parallel_size


class OptimizerConfig(Section):
    """Biases and norms are not decayed."""

    name: Literal["adamw", "lion"] = Field(
        description="a step multiplies weights, adamw: by 1 - lr × weight_decay; lion: by 1 - lr / peak × weight_decay, 1e-6 is not small there"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, description="of adamw")
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0 switches clipping off")


class ScheduleConfig(Section):
    """The learning rate over tokens, after a linear warm-up from zero, which takes precedence over a cooldown.

    trapezoid: constant, then a linear cooldown; cosine: half a cosine; inverse_sqrt: peak × sqrt(warmup_tokens / tokens).
    """

    name: Literal["trapezoid", "cosine", "inverse_sqrt"]
    warmup_tokens: Tokens
    cooldown_fraction: Fraction = Field(0.2, description="of train.tokens; the last part of the trapezoid")
    min_lr_ratio: Fraction = Field(0.0, description="final, for inverse_sqrt least, learning rate as a fraction of the peak")


class TrainConfig(Section):
    """The amount and shape of training."""

    tokens: Tokens = Field(description="length of the run; rounded down to whole steps")
    global_batch_size: PositiveInt = Field(description="samples per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(description="samples per forward pass of one rank")
    log_every_steps: PositiveInt = 10
    branches: list[Tokens] = Field(
        default=[],
        description="milestones as the paper has them: this run's rate stays constant, and for each of these token counts a run of its own "
        "goes on from this one's checkpoint where its cooldown begins (schedule.cooldown_fraction)",
    )


class AnomalyConfig(Section):
    """What becomes of a step whose loss or gradient norm is not finite, or leaps. It changes no weight and is never saved."""

    policy: Literal["stop", "rollback"] = Field(
        "stop",
        description="rollback: go on from the newest checkpoint and leave the batch out, which left_out.jsonl in the run's folder records",
    )
    spike_deviations: float | None = Field(
        None, gt=0, description="standard deviations above the mean of the last 100 steps that loss or gradient norm may lie; null: any"
    )
    left_out_steps: PositiveInt = Field(1, description="batches that a rollback leaves out, the last of them the one that leapt")
    max_rollbacks: PositiveInt = Field(10, description="over all restarts of the run; one more ends it")


class ProfileConfig(Section):
    """A trace of some steps of rank 0, for chrome://tracing or Perfetto."""

    steps: list[PositiveInt] | None = Field(None, min_length=2, max_length=2, description="the first and the last step, as [10,12]")


class CheckpointConfig(Section):
    """When the run is saved, beside its end."""

    save_every_steps: Annotated[int, Field(ge=0)] = Field(0, description="for restarts; 0 saves at milestones only")
    milestones: list[Tokens] = Field(default=[], description="saved and evaluated")


TASKS_WITH_FILES = ("hellaswag", "arc_challenge", "winogrande", "gsm8k", "humaneval", "mbpp")  # that can be read from evals.tasks_dir


class TaskConfig(Section):
    """How a task of lm-eval is run; what is null is as the task itself has it."""

    where: Literal["inline", "worker"] = Field(
        "inline", description="inline: by the run itself, at its milestones; worker: by others, from committed checkpoints"
    )
    shots: Annotated[int, Field(ge=0)] | None = Field(None, description="solved examples before each problem")
    limit: PositiveInt | None = Field(None, description="problems, a choice that is the same for every run; null: all of them")
    repeats: PositiveInt = Field(1, description="answers to each problem")
    temperature: float | None = Field(None, ge=0, description="of generated text; 0 takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="tokens are drawn from the least set that holds this share")
    max_new_tokens: PositiveInt | None = Field(None, description="of one answer")

    @property
    def settings(self) -> dict[str, Any]:
        """What scores depend on."""
        return self.model_dump(mode="json", exclude={"where"})

    @property
    def generation(self) -> dict[str, Any]:
        """The settings of generation that are not the task's own, as lm-eval names them."""
        settings = {"temperature": self.temperature, "top_p": self.top_p, "max_gen_toks": self.max_new_tokens}
        settings |= {"do_sample": None if self.temperature is None else self.temperature > 0}
        return {name: value for name, value in settings.items() if value is not None}


class EvalsConfig(Section):
    """What is measured at each milestone."""

    heldout: dict[Name, str] = Field(default={}, description="domain name -> token-shard folder, for bits per byte")
    max_samples: PositiveInt = Field(512, description="held-out samples read per domain")
    micro_batch_size: PositiveInt = 16
    tasks: dict[Name, TaskConfig] = Field(default={}, description="tasks by lm-eval's names")
    tasks_dir: str | None = Field(None, description="folder of the tasks' files, read instead of the hub's datasets")

    unsafe_code: bool = Field(False, description="run generated programs where no sandbox can be had, with all that this user may do")

    @property
    def inline(self) -> list[str]:
        """The tasks that the run itself scores."""
        return [name for name, task in self.tasks.items() if task.where == "inline"]

    @property
    def of_workers(self) -> list[str]:
        """The tasks that workers score."""
        return [name for name, task in self.tasks.items() if task.where == "worker"]


class TrackConfig(Section):
    """Where metrics are mirrored; runs/<study>/<name>/metrics.jsonl is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "retemper"


class Fp8Config(Section):
    """Of precisions in 8 bits, beside the recipe."""

    param_gather: bool = Field(
        False,
        description="full training keeps and gathers its weights in FP8, beside float32 ones of the optimizer; a frozen base is always in FP8",
    )
    bf16_layers: Annotated[int, Field(ge=0)] = Field(0, description="of the first layers, and as many of the last, that stay in bf16")


class ModelSetup(Section):
    """A model on its ranks: all that building it needs to know."""

    model: ModelConfig
    method: MethodConfig
    parallel: ParallelConfig
    precision: Literal["fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"] = Field(
        "bf16", description="of computation; the 8-bit ones are Transformer Engine's recipes for the linear layers, the rest is bf16 there"
    )
    fp8: Fp8Config = Fp8Config()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(17, description="of initial weights, data order and dropout")

    @property
    def fp8_recipe(self) -> Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None:
        """How FP8 numbers are scaled, where they are computed with."""
        return self.precision.removeprefix("fp8_") if self.precision not in ("fp32", "bf16") else None

    @property
    def fp8_weights(self) -> bool:
        """Whether weights of linear layers are held in FP8, and not in bf16."""
        return self.fp8_recipe is not None and (self.fp8.param_gather or self.method.name == "lora")

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary rounded up so that every rank's shard is equal: to a multiple of 128 wherever that suffices, so
        that weights have one shape at every usual tensor-parallel size."""
        multiple = math.lcm(128, self.parallel.tensor_parallel_size)
        return math.ceil(self.model.vocab_size / multiple) * multiple

    @classmethod
    def of(cls, config: dict[str, Any], parallel: ParallelConfig, **changes: Any) -> "ModelSetup":
        """The model of a dumped config in another layout."""
        kept = {name: config[name] for name in ModelSetup.model_fields if name in config}  # fp8 came later than others
        return cls(**kept | {"parallel": parallel} | changes)


class Config(ModelSetup):
    """One run."""

    study: Name = Field(description="the experiment this run belongs to; the W&B group")
    name: Name = Field(description="of the run; its folder is runs_dir/study/name")
    runs_dir: str = "runs"
    init_from: str | None = Field(None, description="run folder whose newest checkpoint gives the initial weights")
    branch_of: str | None = Field(
        None, description="run folder that this run goes on from, weights, optimizer and data, where its own cooldown begins"
    )
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    anomaly: AnomalyConfig
    profile: ProfileConfig
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

    def logs_after(self, step: int) -> bool:
        """Whether a step is reported: every few, and the last."""
        return step % self.train.log_every_steps == 0 or step == self.steps

    @property
    def cooldown_fraction(self) -> float:
        """Of a trunk none: its branches cool down."""
        return 0.0 if self.train.branches else self.schedule.cooldown_fraction

    def cooldown_begins(self, tokens: int) -> int:
        """The step after which a run of so many tokens cools down."""
        return math.floor(tokens // self.tokens_per_step * (1 - self.schedule.cooldown_fraction))

    @property
    def branch_steps(self) -> list[int]:
        """Steps whose checkpoints this run's branches go on from."""
        return [self.cooldown_begins(tokens) for tokens in self.train.branches]

    @property
    def milestone_steps(self) -> list[int]:
        """Steps after which a milestone's checkpoint is saved and evaluated; the last step is always one."""
        return sorted({min(max(1, tokens // self.tokens_per_step), self.steps) for tokens in self.checkpoint.milestones} | {self.steps})

    @property
    def saved_steps(self) -> set[int]:
        """Steps after which a checkpoint is saved: milestones, beginnings of branches, and every few."""
        every = self.checkpoint.save_every_steps
        return {*self.milestone_steps, *self.branch_steps, *(range(every, self.steps + 1, every) if every else ())}

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2)
