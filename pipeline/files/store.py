"""Whole-file reads from local disk or a remote store, with retries while the store recovers."""

import random
import time

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from retemper.pipeline.errors import UserError

# Reads from a store that fails or hangs are retried for this long, with waits of 1, 2, 4, …
# seconds; then the run stops.
_PATIENCE_SECONDS = 40
# Options of the s3 client: without its own retries, which would multiply with these.
_S3_OPTIONS = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 0}}


class FileMissing(UserError):
    """The file does not exist."""


def is_remote(path: str) -> bool:
    """Return whether a path is the URL of a remote store."""
    return "://" in path


def read(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        FileMissing: The file does not exist.
        UserError: Permission is denied, or the file cannot be read: local files get one attempt,
            remote ones are retried. The message names the file.
    """
    fs, name = _open_store(path)
    began = time.monotonic()
    wait = 1
    while True:
        try:
            return fs.cat_file(name)
        except (FileNotFoundError, NotADirectoryError):
            raise FileMissing(f"{path} is missing") from None
        except PermissionError:
            raise UserError(
                f"no permission to read {path}: check its permissions, or the store's credentials"
            ) from None
        except Exception as error:  # each store raises exceptions of its own
            if not is_remote(path) or time.monotonic() - began + wait > _PATIENCE_SECONDS:
                raise UserError(
                    f"{path} could not be read for {time.monotonic() - began:.0f} s "
                    f"({type(error).__name__}: {error}); when the store is available again, "
                    "the same command goes on from the last checkpoint"
                ) from None
        # The random factor keeps ranks that failed together from retrying at the same time.
        time.sleep(wait * random.uniform(0.5, 1))
        wait *= 2


def _open_store(path: str) -> tuple[AbstractFileSystem, str]:
    if not path.startswith("s3://"):
        return url_to_fs(path)
    fs, name = url_to_fs(path, config_kwargs=_S3_OPTIONS)
    fs.retries = 1
    return fs, name
