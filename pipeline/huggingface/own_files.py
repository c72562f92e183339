"""The small files of a transformers folder, and nothing that lies outside it.

A link out of the folder would carry the content of any file of this machine into runs and exports.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import read_json

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


def refuse_link_out(path: Path) -> None:
    """Check that a file is inside its folder, or where the hub's cache keeps files of the folder.

    Raises:
        UserError: it is a link to anything else.
    """
    folder = path.parent.resolve()
    target = path.resolve()
    is_cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if not target.is_relative_to(folder) and not is_cached:
        raise UserError(
            f"{path} is a link out of its folder, to {target}: "
            "if you trust where it comes from, replace it by a copy of that file"
        )


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those of the files that a folder has.

    Raises:
        UserError: one is a link out of the folder.
    """
    for name in names:
        if (source / name).is_file():
            refuse_link_out(source / name)
            shutil.copyfile(source / name, target / name)


def read_own(path: Path, kind: Any = dict[str, Any]) -> Any:
    """Return the content of a JSON file, which has a type.

    Raises:
        UserError: the file is damaged, or a link out of its folder.
        FileNotFoundError: there is none.
    """
    refuse_link_out(path)
    return read_json(path, kind, "download it again")
