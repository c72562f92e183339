"""A folder of token shards, as `retemper tokenize` left it: its manifest, and its samples by id."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema import Config


def read_manifest(path: str | Path) -> dict:
    """The manifest of a corpus. Raises UserError where there is none."""
    manifest = Path(path, "manifest.json")
    if not manifest.is_file():
        raise UserError(f"{path} holds no token corpus ({manifest.name} is missing): make it with `retemper tokenize`")
    return json.loads(manifest.read_text())


def check_corpora(config: Config) -> dict[str, dict]:
    """Manifests of the training corpus ("train") and the held-out domains, checked against the config.

    Raises UserError with every mismatch: vocabulary, sequence length, tokenizer, and a corpus smaller than one batch.
    """
    manifests = {"train": read_manifest(config.data.path)}
    manifests |= {f"heldout {domain}": read_manifest(path) for domain, path in config.evals.heldout.items()}
    problems = []
    for name, manifest in manifests.items():
        if manifest["vocab_size"] != config.model.vocab_size:
            problems.append(
                f"{name}: the tokenizer of corpus {manifest['name']} has {manifest['vocab_size']} tokens, model.vocab_size is {config.model.vocab_size}"
            )
        if manifest["seq_length"] != config.data.seq_length:
            problems.append(
                f"{name}: corpus {manifest['name']} has samples of {manifest['seq_length']} tokens, data.seq_length is {config.data.seq_length}"
            )
        if manifest["tokenizer_sha256"] != manifests["train"]["tokenizer_sha256"]:
            problems.append(f"{name}: corpus {manifest['name']} was made with another tokenizer than the training corpus")
        if manifest["packing"] != "concat" or manifest["made_from"]["source"]["prompt"] is not None:
            problems.append(
                f"{name}: corpus {manifest['name']} has padding or prompts, which training cannot leave out of the loss yet; "
                "tokenize it with data.packing=concat and without data.source.prompt"
            )
        if name != "train" and not manifest["splits"]["heldout"]["samples"]:
            problems.append(f"{name}: corpus {manifest['name']} has no held-out sample; raise data.heldout_fraction and tokenize again")
    available = manifests["train"]["splits"]["train"]["samples"]
    if available < config.train.global_batch_size:
        problems.append(
            f"train: the corpus has {available} samples, fewer than one batch of train.global_batch_size={config.train.global_batch_size}; "
            "give more text or a smaller batch"
        )
    if problems:
        raise UserError("\n".join(["The data does not fit the run:", *(f"  - {problem}" for problem in problems)]))
    return manifests


# Columns that hold a value for each piece of a document in the sample (tokenize/shards.py writes them).
_PIECES = {"lengths": "<u4", "documents": "<u8", "prompt_lengths": "<u4"}


class TokenShards:
    """Samples of one split by id, through mosaicml-streaming's shard readers."""

    def __init__(self, path: str | Path, split: str):
        """Open `path/split`. Raises UserError where its index or a shard is missing."""
        from streaming.base.format import reader_from_json
        from streaming.base.spanner import Spanner

        folder = Path(path, split)
        index = folder / "index.json"
        if not index.is_file():
            raise UserError(f"{index} is missing: remove {path} and tokenize again")
        self._shards = [reader_from_json(str(folder), "", shard) for shard in json.loads(index.read_text())["shards"]]
        for shard in self._shards:
            shard.validate(allow_unsafe_types=False)
            _unpack(folder, shard, path)
        sizes = np.array([shard.samples for shard in self._shards], np.int64)
        self._locate = Spanner(sizes)
        self._size = int(sizes.sum())

    def __len__(self) -> int:
        return self._size

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of the samples, int64 (len(ids), seq_length)."""
        return np.stack([self.sample(int(id))["tokens"] for id in ids]).astype(np.int64)

    def sample(self, id: int) -> dict[str, np.ndarray]:
        """One sample: tokens (seq_length,); of each piece of a document in it lengths, documents and prompt_lengths (pieces,)."""
        shard, position = self._locate[id]
        sample = self._shards[shard][position]
        return {name: np.frombuffer(value, _PIECES[name]) if name in _PIECES else value for name, value in sample.items()}


def _unpack(folder: Path, shard, path: str | Path) -> None:
    """Have the uncompressed shard beside the compressed one, checked against the index. Raises UserError where it cannot be."""
    file = folder / shard.raw_data.basename
    if file.is_file():
        return
    packed = folder / shard.zip_data.basename if shard.zip_data else file
    if not packed.is_file():
        raise UserError(f"{packed} is missing: remove {path} and tokenize again")
    from streaming.base.compression import decompress

    try:
        content = decompress(shard.compression, packed.read_bytes())
    except Exception:  # each compression has its own
        content = b""
    if hashlib.sha256(content).hexdigest() != shard.raw_data.hashes["sha256"]:
        raise UserError(f"{packed} is damaged: remove {path} and tokenize again")
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # every rank may be here
    temporary.write_bytes(content)
    temporary.replace(file)
