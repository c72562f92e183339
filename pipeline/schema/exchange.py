"""The requests that are passed to the ranks of `retemper import` and `retemper export`."""

from retemper.pipeline.schema.section import Section


class ImportRequest(Section):
    """The import of a transformers folder as a run from which other runs can start."""

    folder: str
    """Transformers folder on this machine."""
    run: str
    """Run folder to create."""
    name: str | None = None
    """Name of the model on the hub, if it came from there."""
    trust: str | None = None
    """Name of the folder, if Python code in it may be ignored."""
    keys: list[str] = []
    """Overrides of parallel.*, as key=value."""

    @property
    def arguments(self) -> list[str]:
        """The arguments of `python -m retemper.pipeline.huggingface`."""
        return ["import", self.model_dump_json()]


class ExportRequest(Section):
    """The export of a checkpoint as a transformers folder, or of its adapters for peft."""

    run: str
    """Folder of the run."""
    folder: str
    """Folder to create."""
    step: int | None = None
    """Step of the checkpoint; null for the newest."""
    adapter: bool = False
    """Write adapters for peft instead of a whole model for transformers."""
    base: str | None = None
    """Base model that the adapter refers to; see huggingface/export.py, base_of."""
    tokenizer: str | None = None
    """Tokenizer of a model that was never imported; see huggingface/export.py, tokenizer_of."""
    error_file: str | None = None
    """File to which the message of a failure is written, for the process that waits for it."""

    @property
    def arguments(self) -> list[str]:
        """The arguments of `python -m retemper.pipeline.huggingface`."""
        return ["export", self.model_dump_json()]
