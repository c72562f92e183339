"""The corpora of a run, training streams and held-out domains, checked before anything starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.corpus.manifest import find_manifest, read_manifest
from retemper.pipeline.corpus.tokenizer import sha256_here
from retemper.pipeline.data.order import ORDER_VERSION
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config


def stream_paths(config: Config) -> dict[str, str]:
    """Return name -> folder of every training stream, sorted by name.

    The ids of samples, and so their order, depend on this order.
    """
    mixed_in = {name: stream.path for name, stream in config.data.mixed_in.items()}
    return dict(sorted(({config.data.name: config.data.path} | mixed_in).items()))


def cache_folder(config: Config, name: str) -> Path:
    """Return the folder in which this run stores fetched or decompressed shards of one corpus."""
    cache = config.data.cache_dir
    return (Path(cache, config.study, config.name) if cache else config.run_dir / "cache") / name


def decontaminated(config: Config, task: str) -> dict[str, bool | None]:
    """Return whether each training stream was decontaminated against an evaluation task.

    That is, whether documents that share text with the task's problems were removed from it.

    Returns:
        Training stream -> what its manifest records, or None where that cannot be read from here.
    """
    manifests = {name: find_manifest(path) for name, path in stream_paths(config).items()}
    return {
        name: task in manifest.get("decontamination", {}).get("tasks", {}) if manifest else None
        for name, manifest in manifests.items()
    }


def check_corpora(config: Config) -> dict[str, Any]:
    """Check every manifest against the config.

    A data.tokenizer that is not on this machine is not compared: training only reads token ids.

    Returns:
        The fingerprints of "data" and "tokenizer".

    Raises:
        UserError: with every mismatch of vocabulary, sequence length and tokenizer, and for a
            corpus smaller than one batch.
    """
    paths = stream_paths(config)
    manifests = {name: read_manifest(path) for name, path in paths.items()}
    heldout = {
        f"heldout {domain}": read_manifest(path) for domain, path in config.evals.heldout.items()
    }
    own = manifests[config.data.name]
    problems = [
        problem
        for name, manifest in (manifests | heldout).items()
        for problem in _mismatches(config, name, manifest, own)
    ]
    if (tokenizer := sha256_here(config.data.tokenizer)) and tokenizer != own["tokenizer_sha256"]:
        problems.append(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than the one that corpus "
            f"{own['name']} in {config.data.path} was made with: set that one, "
            "or tokenize again to another data.path"
        )
    for name, manifest in heldout.items():
        if not manifest["splits"][HELDOUT]["samples"]:
            problems.append(
                f"{name}: corpus {manifest['name']} has no held-out samples: "
                "increase data.heldout_fraction and tokenize again"
            )
    available = own["splits"][TRAIN]["samples"]
    if available < config.train.global_batch_size:
        problems.append(
            f"{config.data.name}: the corpus has {available} samples, fewer than one batch of "
            f"train.global_batch_size={config.train.global_batch_size}; "
            "add text or set a smaller batch"
        )
    if problems:
        raise UserError(
            "\n".join(
                ["The data does not match the run:", *(f"  - {problem}" for problem in problems)]
            )
        )
    shares = config.data.samples_per_window
    window = config.data.mixture_window
    streams = {
        name: f"{manifest['fingerprint']}, {shares[name]} of {window} samples"
        for name, manifest in manifests.items()
    }
    return {
        "data": {"order": ORDER_VERSION, "streams": streams},
        "tokenizer": own["tokenizer_sha256"],
    }


def _mismatches(config: Config, name: str, manifest: dict, own: dict) -> Iterator[str]:
    if manifest["vocab_size"] > config.model.vocab_size:
        yield (
            f"{name}: the tokenizer of corpus {manifest['name']} has {manifest['vocab_size']} "
            f"tokens, model.vocab_size is only {config.model.vocab_size}"
        )
    if manifest["seq_length"] != config.data.seq_length:
        yield (
            f"{name}: corpus {manifest['name']} has samples of {manifest['seq_length']} tokens, "
            f"data.seq_length is {config.data.seq_length}"
        )
    if manifest["tokenizer_sha256"] != own["tokenizer_sha256"]:
        yield (
            f"{name}: corpus {manifest['name']} was made with another tokenizer than {own['name']}"
        )
