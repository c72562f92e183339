"""JSON files that contain a hash of their other content, so that a change is detected."""

import hashlib
import json


def dump_sealed(manifest: dict) -> str:
    """Return a manifest as JSON text whose last key is a hash over the other content."""
    return json.dumps(manifest | {"sha256": _hash_of(manifest)}, indent=2)


def is_intact(sealed: dict) -> bool:
    """Return whether the hash of `dump_sealed` matches the content, in any order of keys."""
    content = {key: value for key, value in sealed.items() if key != "sha256"}
    return sealed.get("sha256") == _hash_of(content)


def _hash_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
