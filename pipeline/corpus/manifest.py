"""The manifest of a token corpus: what `retemper tokenize` writes last, and everything reads first. Local or remote."""

import hashlib
import json

from retemper.pipeline.corpus.format import HELDOUT, TRAIN
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.files.sealed import is_intact

MANIFEST = "manifest.json"
# What training reads beside the manifest and the shards; the manifest holds their hashes.
READ_BY_TRAINING = (f"{TRAIN}/index.json", f"{HELDOUT}/index.json", "token_bytes.npy")


class Damaged(UserError):
    """A file is not the one that was written."""


def find_manifest(path: str) -> dict | None:
    """The manifest of the corpus at `path`; None where there is no file of its name.

    Raises UserError where it is damaged, or of something else.
    """
    try:
        manifest = json.loads(store.read(f"{path}/{MANIFEST}"))
    except store.Missing:
        return None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        manifest = None
    if (
        not isinstance(manifest, dict)
        or not {"made_from", "fingerprint", "splits"} <= manifest.keys()
    ):
        raise UserError(
            f"{path} is not a token corpus (its {MANIFEST} is none of one, or damaged): choose another folder, or remove it"
        )
    if not is_intact(manifest):
        raise UserError(
            f"{path}/{MANIFEST} is damaged, or of another version of retemper: remove {path} and tokenize again"
        )
    del manifest["sha256"]
    return manifest


def read_manifest(path: str) -> dict:
    """The manifest of the corpus at `path`. Raises UserError where there is none or it is damaged."""
    if manifest := find_manifest(path):
        return manifest
    raise UserError(
        f"{path} holds no token corpus (it has no {MANIFEST} of one): make it with `retemper tokenize`"
    )


def read_listed(path: str, manifest: dict, name: str) -> bytes:
    """A file beside the manifest, one of READ_BY_TRAINING. Raises UserError where it is not the one that was written."""
    for _attempt in range(2):
        content = store.read(f"{path}/{name}")
        if hashlib.sha256(content).hexdigest() == manifest["files"][name]:
            return content
    raise Damaged(
        f"{path}/{name} is damaged: run the `retemper tokenize` command that made {path} again"
    )
