"""The differences between two dumped configs."""

import json
from typing import Any


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys whose values differ between two dumped configs, as "key: before -> after".

    Args:
        before: the first config.
        after: the second config.
        prefix: the section that both configs are, as "model."; it is put before every key.
    """
    changes = []
    for key in sorted(before.keys() | after.keys()):
        old = before.get(key)
        new = after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return changes
