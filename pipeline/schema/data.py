"""The keys of a corpus, and of what a run reads of it."""

from typing import Annotated, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Name, PositiveInt, Section, Tokens


class SourceConfig(Section):
    """Where documents come from."""

    kind: Literal["rows", "text", "docstrings"] = Field(
        description="rows: one document a row of jsonl (plain, .gz, .zst) or parquet; text: one a file; docstrings: one a Python module"
    )
    path: str = Field(
        description="a folder or file, also s3://, gs://, hf://datasets/OWNER/NAME/FOLDER; stdlib: this Python's standard library; package:NAME an installed package"
    )
    revision: str = Field(
        "main",
        description="of a hub source: branch, tag or commit; the commit it stands for is pinned and recorded",
    )
    glob: str | None = Field(
        None, description="which files below a folder; by default what the kind's name says"
    )
    exclude: list[str] = Field(default=[], description="names of files and folders left out")
    text_key: str = Field("text", description="the column of rows that is trained on")
    prompt: str | None = Field(
        None,
        description="instruction pairs: what stands before the text, without loss; {column} is replaced by that column of the row",
    )
    metadata_keys: list[str] = Field(
        default=[], description="columns that reports quote beside a document"
    )


class CleanConfig(Section):
    """What is left out of a corpus; every rule counts what it dropped."""

    min_chars: Annotated[int, Field(ge=1)] = Field(
        1, description="shorter documents, surrounding whitespace aside, are dropped"
    )
    max_chars: PositiveInt | None = Field(
        None, description="longer documents are dropped; null keeps any length"
    )
    nul_bytes: bool = Field(True, description="drop documents with NUL characters")
    generated: bool = Field(
        False, description="drop code that says in its first lines that a program wrote it"
    )
    minified: bool = Field(
        False, description="drop code with lines longer than 1000 characters, or 100 on average"
    )
    duplicates: bool = Field(True, description="keep one of the documents with the same content")
    invalid_utf8: Literal["drop", "replace"] = Field(
        "drop", description="replace puts U+FFFD where bytes are no UTF-8"
    )


class DecontaminateConfig(Section):
    """Which evaluation problems must not be in the corpus: documents that share an n-gram of words with one are dropped."""

    tasks: dict[str, str] = Field(
        min_length=1,
        description="task name -> file or folder of its problems, jsonl or parquet, local or remote",
    )
    ngram: Annotated[int, Field(ge=4, le=64)] = Field(
        13, description="words, in lower case and without punctuation"
    )


class SlurmConfig(Section):
    """What sbatch is told."""

    partition: str
    time: str = Field("24:00:00", description="limit of one job of the array")
    mem_per_cpu_gb: PositiveInt = 4
    sbatch_args: dict[str, str] = Field(
        default={}, description="further options, as account: physics"
    )


class CorpusConfig(Section):
    """One corpus: the documents it is made of and the folder of token shards it becomes."""

    name: Name
    path: str = Field(
        description="folder of the token shards, also s3:// and gs://: written by `retemper tokenize`, read by training"
    )
    work_dir: str | None = Field(
        None,
        description="where the folder NAME.partial of intermediate files stands until the end; by default beside path, for a remote path here",
    )
    tokenizer: str = Field(
        description="folder of a transformers fast tokenizer, or its hub name, as owner/name@revision"
    )
    bos: bool = Field(False, description="begin each document with the tokenizer's begin-of-text")
    eos: bool = Field(True, description="end each document with the tokenizer's end-of-text")
    seq_length: PositiveInt = Field(description="tokens per sample")
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="concat: documents joined and cut at seq_length; best_fit: padded, no document cut unless it is longer",
    )
    tokens: Tokens | None = Field(
        None, description="training tokens, rounded down to whole samples; null takes all documents"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        17, description="of the order of documents, and so of the choice for `tokens`"
    )
    source: SourceConfig
    clean: CleanConfig = CleanConfig()
    decontaminate: DecontaminateConfig | None = None
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="documents kept out of training, chosen by content hash"
    )
    near_duplicates: Literal["count", "drop", "keep"] = Field(
        "count",
        description="training documents that are near-duplicates of held-out ones: "
        "counted and named, dropped, or not looked for",
    )
    compression: Literal["zstd"] | None = Field(None, description="of the shards")
    allow_broken_files: bool = Field(
        False, description="keep what could be read of damaged files instead of stopping at the end"
    )
    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: PositiveInt | None = Field(
        None, description="processes that tokenize at once; null takes every core"
    )
    slurm: SlurmConfig | None = None


class StreamConfig(Section):
    """A corpus mixed into the run's own."""

    path: str = Field(description="folder of its token shards, also s3:// and gs://")
    fraction: float = Field(gt=0, lt=1, description="of all training samples")


class DataConfig(CorpusConfig):
    """The corpus of a run, what is mixed into it, and how training reads them."""

    mixture: dict[Name, StreamConfig] = Field(
        default={}, description="further corpora by name; the run's own corpus takes the rest"
    )
    replay: StreamConfig | None = Field(
        None, description="a corpus like what the base model knew, against forgetting"
    )
    mixture_window: PositiveInt = Field(
        100, description="samples over which every corpus comes exactly at its fraction"
    )
    mask_documents: bool = Field(
        False, description="attention stays within a document, and positions begin anew in each"
    )
    cache_dir: str | None = Field(
        None,
        description="folder of each node's own disk for shards fetched or unpacked, kept after the run; by default the run's folder",
    )
    bad_shards: Literal["stop", "skip"] = Field(
        "stop",
        description="what a shard means that is damaged at its source: the end of the run, or its samples left out and recorded",
    )
    allow_change: bool = Field(
        False,
        description="let a run go on with other data than it began with; the switch is recorded",
    )
    ledger: bool = Field(
        False, description="record the samples of every step, for `retemper data verify`"
    )
