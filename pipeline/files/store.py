"""Files of a corpus, local or remote, read whole; a remote store gets time to recover."""

import random
import time

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from retemper.pipeline.errors import UserError

# A store that fails or hangs is asked again for this long, waiting 1, 2, 4, … seconds, and then the run stops.
_PATIENCE_SECONDS = 40
# Of the s3 client, whose own retries would multiply with these.
_S3_OPTIONS = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 0}}


class Missing(UserError):
    """There is no such file."""


def is_remote(path: str) -> bool:
    return "://" in path


def read(path: str) -> bytes:
    """The content of a file. Raises UserError that names it where it is missing or the store does not give it."""
    fs, name = _open_store(path)
    began = time.monotonic()
    wait = 1
    while True:
        try:
            return fs.cat_file(name)
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"{path} is missing") from None
        except PermissionError:
            raise UserError(
                f"{path} may not be read: check its permissions, or the store's credentials"
            ) from None
        except Exception as error:  # each store has its own
            if not is_remote(path) or time.monotonic() - began + wait > _PATIENCE_SECONDS:
                raise UserError(
                    f"{path} could not be read for {time.monotonic() - began:.0f} s ({type(error).__name__}: {error}); "
                    "when the store is well again, the same command goes on from the last checkpoint"
                ) from None
        time.sleep(
            wait * random.uniform(0.5, 1)
        )  # ranks that failed together do not ask again together
        wait *= 2


def _open_store(path: str) -> tuple[AbstractFileSystem, str]:
    if not path.startswith("s3://"):
        return url_to_fs(path)
    fs, name = url_to_fs(path, config_kwargs=_S3_OPTIONS)
    fs.retries = 1
    return fs, name
