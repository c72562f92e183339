"""The config keys of a corpus, and of how a run reads corpora."""

from typing import Annotated, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Name, PositiveInt, Section, Tokens


class SourceConfig(Section):
    """The source of the documents."""

    kind: Literal["rows", "text", "docstrings"]
    """rows: one document per row of jsonl (plain, .gz, .zst) or parquet, or per element of a JSON
    array; text: one per file; docstrings: one per Python module."""
    path: str
    """Folder or file, also s3://, gs:// and hf://datasets/OWNER/NAME/FOLDER; stdlib: the
    standard library of this Python; package:NAME: an installed package."""
    revision: str = "main"
    """Branch, tag or commit of a source on the Hugging Face hub. The commit that it resolves to
    is pinned and recorded."""
    glob: str | None = None
    """Pattern of the files to read in a folder. By default all files, for kind=docstrings all
    Python files."""
    exclude: list[str] = Field(default=[])
    """Names of files and folders to exclude."""
    include_hidden: bool = False
    """Also read the hidden files and folders of a folder (.git, .env), and caches (__pycache__,
    node_modules). A glob that names them has the same effect."""
    text_key: str = "text"
    """Column of the rows that contains the text."""
    prompt: str | None = None
    """Prompt of instruction pairs, put before the text and excluded from the loss. {column} is
    replaced by that column of the row."""
    metadata_keys: list[str] = Field(default=[])
    """Columns that reports show beside a document."""


class CleanConfig(Section):
    """The filters of a corpus. Each filter counts the documents that it dropped."""

    min_chars: Annotated[int, Field(ge=1)] = 1
    """Minimum number of characters, without surrounding whitespace; shorter documents are
    dropped."""
    max_chars: PositiveInt | None = None
    """Maximum number of characters; longer documents are dropped. null keeps any length."""
    nul_bytes: bool = True
    """Drop documents that contain NUL characters."""
    generated: bool = False
    """Drop code whose first lines state that a program generated it."""
    minified: bool = False
    """Drop code with lines longer than 1000 characters, or 100 on average."""
    repository_marks: Literal["keep", "strip"] = "keep"
    """The line <reponame>…<filename>…<gh_stars>… that StarCoder's data has before half of its
    files: keep it as text, or strip it. The manifest counts the documents with one."""
    duplicates: bool = True
    """Keep one of the documents with the same content."""
    invalid_utf8: Literal["drop", "replace"] = "drop"
    """On invalid UTF-8: drop the document, or replace the invalid bytes by U+FFFD."""


class DecontaminateConfig(Section):
    """The evaluation problems that must not be in the corpus.

    Documents that share an n-gram of words with one of them are dropped.
    """

    tasks: dict[str, str] = Field(min_length=1)
    """Task name -> file or folder of its problems, jsonl or parquet, local or remote."""
    ngram: Annotated[int, Field(ge=4, le=64)] = 13
    """Number of words per n-gram, in lower case and without punctuation."""


class SlurmConfig(Section):
    """The options of sbatch for tokenization jobs."""

    partition: str
    """Slurm partition of the jobs."""
    time: str = "24:00:00"
    """Time limit of one job of the array."""
    mem_per_cpu_gb: PositiveInt = 4
    """Memory per CPU in GB."""
    sbatch_args: dict[str, str] = Field(default={})
    """Further options of sbatch, e.g. {account: physics}."""


class CorpusConfig(Section):
    """One corpus: its documents and the folder of token shards that it is written to."""

    name: Name
    """Name of the corpus."""
    path: str
    """Folder of the token shards, also s3:// and gs://: written by `retemper tokenize`, read by
    training."""
    work_dir: str | None = None
    """Location of the folder NAME.partial with intermediate files, which is removed at the end.
    By default beside path; the current folder where path is remote."""
    tokenizer: str
    """Folder of a transformers fast tokenizer, or its name on the hub, e.g. owner/name@revision."""
    bos: bool = False
    """Begin each document with the tokenizer's begin-of-text token."""
    eos: bool = True
    """End each document with the tokenizer's end-of-text token."""
    seq_length: PositiveInt
    """Tokens per sample."""
    packing: Literal["concat", "best_fit", "none"] = "concat"
    """concat: documents are concatenated and cut at seq_length; best_fit: a sample has as many
    whole documents as fit, and padding; none: a sample has one document, and padding. The latter
    two cut only documents longer than seq_length."""
    tokens: Tokens | None = None
    """Number of training tokens, rounded down to whole samples. null uses all documents."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    """Seed of the order of documents, and so of the selection of documents for `tokens`."""
    source: SourceConfig
    """Source of the documents."""
    clean: CleanConfig = CleanConfig()
    """Filters for documents."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation problems whose text is removed from the corpus. null removes nothing."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Fraction of the documents held out from training, selected by content hash."""
    near_duplicates: Literal["count", "drop", "keep"] = "count"
    """Training documents that are near-duplicates of held-out ones: count and list them, drop
    them, or keep them without a search."""
    compression: Literal["zstd"] | None = None
    """Compression of the shards. null stores them uncompressed."""
    allow_broken_files: bool = False
    """Keep the readable part of damaged files, instead of failing after all files are read."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Tokenize in local processes, in a Slurm job array, or on Ray."""
    tasks: PositiveInt | None = None
    """Number of parallel tokenization processes. null uses every core; a corpus of one part, about
    64 MiB of its source, is always written by one process."""
    slurm: SlurmConfig | None = None
    """Options of Slurm, required with executor=slurm."""

    @property
    def keeps_whole(self) -> bool:
        """Whether documents that fit into a sample are never cut."""
        return self.packing != "concat"


REPLAY = "replay"  # the name of data.replay among the training streams


class StreamConfig(Section):
    """A corpus that is mixed into the run's own corpus."""

    path: str
    """Folder of its token shards, also s3:// and gs://."""
    fraction: float = Field(gt=0, lt=1)
    """Fraction of all training samples."""


class DataConfig(CorpusConfig):
    """The corpus of a run, the corpora mixed into it, and how training reads them."""

    mixture: dict[Name, StreamConfig] = Field(default={})
    """Further corpora by name; the run's own corpus makes up the rest of the samples."""
    replay: StreamConfig | None = None
    """Pretraining-like corpus to mix in, to reduce forgetting."""
    mixture_window: PositiveInt = 100
    """Window, in samples, in which every corpus occurs exactly at its fraction."""
    mask_documents: bool = False
    """Restrict attention to the tokens of the same document, and restart positions at each
    document."""
    cache_dir: str | None = None
    """Folder on a local disk of each node for shards that are downloaded or decompressed; they
    are kept after the run. By default in the run's folder."""
    bad_shards: Literal["stop", "skip"] = "stop"
    """On a corrupt shard: stop the run, or skip its samples and record them. A shard counts as
    corrupt if it is damaged at its source."""
    allow_change: bool = False
    """Allow an existing run to resume with other data; the change is recorded."""
    ledger: bool = False
    """Record the samples of every step, for `retemper data verify`."""

    @property
    def mixed_in(self) -> dict[str, StreamConfig]:
        """The streams beside the run's own corpus, by name."""
        return self.mixture | ({REPLAY: self.replay} if self.replay else {})

    @property
    def samples_per_window(self) -> dict[str, int]:
        """The number of samples of each training stream in every mixture_window, by name."""
        window = self.mixture_window
        mixed_in = {name: round(stream.fraction * window) for name, stream in self.mixed_in.items()}
        return {self.name: window - sum(mixed_in.values())} | mixed_in
