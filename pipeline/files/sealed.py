"""JSON files that hold a hash of all else in them, so that a change is noticed."""

import hashlib
import json


def seal(manifest: dict) -> str:
    """The text of manifest.json: a hash over all else comes last."""
    return json.dumps(manifest | {"sha256": _hash_of(manifest)}, indent=2)


def is_intact(sealed: dict) -> bool:
    """Whether the hash in what `seal` wrote is that of all else in it, whatever the order of its
    keys.
    """
    kept = {key: value for key, value in sealed.items() if key != "sha256"}
    return sealed.get("sha256") == _hash_of(kept)


def _hash_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
