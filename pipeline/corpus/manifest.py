"""The manifest of a local or remote token corpus.

`retemper tokenize` writes it last; every reader of the corpus reads it first.
"""

import hashlib
from typing import Annotated, Any, TypedDict

from pydantic import Field

from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.files.json_file import parse_json, with_other_keys
from retemper.pipeline.files.sealed import is_intact

MANIFEST = "manifest.json"
SOURCES = "sources.jsonl"
# The files that training reads besides the manifest and the shards; the manifest has their hashes.
READ_BY_TRAINING = (f"{TRAIN}/index.json", f"{HELDOUT}/index.json", "token_bytes.npy")


_Count = Annotated[int, Field(ge=0)]


@with_other_keys
class _Split(TypedDict):
    documents: _Count
    samples: _Count
    tokens: _Count


class _Splits(TypedDict):
    train: _Split
    heldout: _Split


@with_other_keys
class _Manifest(TypedDict):
    """What is read of a manifest."""

    name: str
    made_from: dict[str, Any]
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: _Count
    seq_length: Annotated[int, Field(gt=0)]
    splits: _Splits
    files: dict[str, str]


class FileDamaged(UserError):
    """The content of a file differs from what was written."""


def find_manifest(path: str) -> dict | None:
    """Return the manifest of the corpus at `path`, or None if there is no manifest.json.

    Raises:
        UserError: manifest.json is corrupt, or is not the manifest of a token corpus.
    """
    try:
        content = store.read(f"{path}/{MANIFEST}")
    except store.FileMissing:
        return None
    try:
        manifest = parse_json(content, _Manifest)
    except ValueError as error:
        raise UserError(
            f"{path} is not a token corpus, or {path}/{MANIFEST} is damaged ({error}): "
            f"choose another folder, or remove {path} and tokenize again"
        ) from None
    if not is_intact(manifest):
        raise UserError(
            f"{path}/{MANIFEST} is damaged, or was written by another version of retemper: "
            f"remove {path} and tokenize again"
        )
    del manifest["sha256"]
    return manifest


def read_manifest(path: str) -> dict:
    """Return the manifest of the corpus at `path`.

    Raises:
        UserError: manifest.json is missing, corrupt, or not the manifest of a token corpus.
    """
    if manifest := find_manifest(path):
        return manifest
    raise UserError(
        f"{path} holds no token corpus ({MANIFEST} is missing): make one with `retemper tokenize`"
    )


def read_verified(path: str, manifest: dict, name: str) -> bytes:
    """Return the content of a file beside the manifest, verified against its hash there.

    Args:
        path: The corpus.
        manifest: Its manifest.
        name: The name of the file, one that the manifest has the hash of.

    Raises:
        FileDamaged: The content differs from what was written.
        UserError: The file is missing or cannot be read.
    """
    for _attempt in range(2):
        content = store.read(f"{path}/{name}")
        if hashlib.sha256(content).hexdigest() == manifest["files"].get(name):
            return content
    raise FileDamaged(
        f"{path}/{name} is damaged: run the `retemper tokenize` command that made {path} again"
    )


def describe_near_duplicates(manifest: dict) -> str:
    """Describe what happened to training documents that are near-duplicates of held-out ones.

    Returns an empty string where the corpus has no held-out text.
    """
    if not manifest["splits"][HELDOUT]["documents"]:
        return ""
    near_duplicates = manifest.get("near_duplicates", {"action": "keep"})
    if near_duplicates["action"] == "keep":
        return (
            "near-duplicates of held-out documents were not looked for: "
            "data.near_duplicates=count with another data.path does"
        )
    of_heldout = f"near-duplicates of the {near_duplicates['compared_with']:,} held-out documents"
    documents = f"{near_duplicates['documents']:,}"
    if near_duplicates["action"] == "drop":
        return f"{of_heldout}: {documents} documents left out of training (near_duplicates.jsonl)"
    return (
        f"{of_heldout}: {documents} of {manifest['splits'][TRAIN]['documents']:,} "
        "training documents (near_duplicates.jsonl); "
        "data.near_duplicates=drop with another data.path leaves them out"
    )
