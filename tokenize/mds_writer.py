"""The MDSWriter of streaming, imported without the rest of that library.

The packages streaming and streaming.base import all its dataset classes, and with them transformers
and scikit-learn: twice the time and memory of what the writer itself needs.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _packages_not_executed(*names: str) -> Iterator[None]:
    """Let modules of packages be imported without the code of the packages' __init__.py.

    A later import of such a package executes it and finds the modules that exist already.
    """
    added = [name for name in names if name not in sys.modules]
    for name in added:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


with _packages_not_executed("streaming", "streaming.base"):
    from streaming.base.format.mds.writer import MDSWriter

__all__ = ["MDSWriter"]
