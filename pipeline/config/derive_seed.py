"""Seeds derived from the seed of the config, each for one purpose."""

import hashlib


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed of printable parts, the same on every machine and Python."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
