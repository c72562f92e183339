"""The weights of a transformers folder, read block by block.

Incomplete folders and files that contain anything but weights are refused before use.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.digest import sha256
from retemper.pipeline.files.json_file import with_other_keys
from retemper.pipeline.huggingface.names import EMBEDDING, HEAD, Region, tensor_shapes
from retemper.pipeline.huggingface.own_files import (
    GENERATION,
    TOKENIZER_FILES,
    read_own,
    refuse_link_out,
)
from retemper.pipeline.huggingface.source_config import model_of, read_config

# Buffers that old versions of transformers saved, and that every model computes itself.
_BUFFERS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"
)
_ROWS = 1 << 14  # the number of rows of two matrices that are compared at a time


@with_other_keys
class _Index(TypedDict):
    weight_map: dict[str, str]


class Weights:
    """The tensors of one folder by name.

    No code in the folder is run: pickles are read as tensors or not at all.
    """

    def __init__(self, folder: Path, *, trusted: bool = False):
        """Open and check the folder.

        Args:
            folder: with config.json and weights.
            trusted: ignore Python code in the folder instead of refusing it.

        Raises:
            UserError: something is unsupported, missing, of another shape, damaged, or code.
        """
        self.folder = folder
        self.config = read_config(folder)
        if not trusted:
            _refuse_code(folder, self.config)
        self.model = model_of(self.config, folder)
        for name in TOKENIZER_FILES:
            refuse_link_out(folder / name)
        if (folder / GENERATION).exists():
            read_own(folder / GENERATION)
        self._file_of = _files(folder)
        self._open: dict[str, Any] = {}
        self._check_shapes()

    @property
    def names(self) -> list[str]:
        """The names of the model's tensors, in the order of tensor_shapes."""
        return list(tensor_shapes(self.model))

    @property
    def sha256(self) -> str:
        """The hash of the weights' files and of the model that config.json describes."""
        files = {file: sha256(self.folder / file) for file in sorted(set(self._file_of.values()))}
        return hashlib.sha256(
            json.dumps([self.model.model_dump(), files], sort_keys=True).encode()
        ).hexdigest()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading its elements."""
        return self.read(name, tuple(slice(0, 0) for _ in self._shape(name))).dtype

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Return a block of a tensor; only this block is read from the file."""
        tensors = self._file(self._file_of[name])
        if isinstance(tensors, dict):
            return tensors[name][region]
        return tensors.get_slice(name)[region]

    def _shape(self, name: str) -> tuple[int, ...]:
        tensors = self._file(self._file_of[name])
        return tuple(
            tensors[name].shape
            if isinstance(tensors, dict)
            else tensors.get_slice(name).get_shape()
        )

    def _file(self, file: str):
        if file not in self._open:
            self._open[file] = _open(self.folder / file)
        return self._open[file]

    def _check_shapes(self) -> None:
        if self.model.num_layers > len(self._file_of):  # and the shapes of that many take long
            raise UserError(
                f"{self.folder}/config.json has num_hidden_layers={self.model.num_layers}, "
                f"but there are only {len(self._file_of)} tensors beside it"
            )
        expected = tensor_shapes(self.model)
        problems = self._misplaced()
        problems += [f"{name} is missing" for name in expected.keys() - self._file_of.keys()]
        # A tied head may be stored in addition to the embedding.
        tied = {HEAD} if self.model.tie_embeddings else set()
        extra = [
            name
            for name in self._file_of.keys() - expected.keys() - tied
            if not _BUFFERS.fullmatch(name)
        ]
        problems += [f"{name} belongs to no part of this architecture" for name in extra]
        for name in expected.keys() & self._file_of.keys():
            problems += self._unlike(name, expected[name])
        if not problems and tied & self._file_of.keys():
            problems += self._untied()
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in sorted(problems)[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(
                f"{self.folder} does not hold the model of its config.json:\n{listed}{more}"
            )

    def _unlike(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Return the problems with a tensor that should have a shape."""
        problems: list[str] = []
        actual = self._try_shape(name, problems)
        if actual not in (None, shape):
            problems.append(f"{name} has the shape {actual}, config.json asks for {shape}")
        elif actual and not ((dtype := self.dtype(name)).is_floating_point and dtype.itemsize > 1):
            problems.append(f"{name} is of type {dtype}: quantised weights are not supported")
        return problems

    def _misplaced(self) -> list[str]:
        """Return a problem for each tensor of a file that the index places elsewhere or nowhere.

        transformers loads all tensors of a file, whatever the index says.
        """
        return [
            f"{name} is in {file}, but the index "
            + (f"says {self._file_of[name]}" if name in self._file_of else "does not name it")
            for file in sorted(set(self._file_of.values()))
            for name in self._file(file).keys()  # noqa: SIM118  # of an open file, no dictionary
            if self._file_of.get(name) != file and not _BUFFERS.fullmatch(name)
        ]

    def _untied(self) -> list[str]:
        """Return a problem if the head that config.json ties to the embedding is another matrix."""
        problems: list[str] = []
        shape = self._shape(EMBEDDING)
        head_shape = self._try_shape(HEAD, problems)
        blocks = [slice(row, row + _ROWS) for row in range(0, shape[0], _ROWS)]
        if head_shape and (head_shape != shape or not all(map(self._is_tied, blocks))):
            problems.append(
                f"{HEAD} is not the same matrix as {EMBEDDING}, although config.json ties them: "
                "set tie_word_embeddings to false there to keep both, "
                "or load and save the folder with transformers, which leaves the head out"
            )
        return problems

    def _is_tied(self, rows: slice) -> bool:
        embedding, head = (self.read(name, (rows,)).float() for name in (EMBEDDING, HEAD))
        return embedding.equal(head)

    def _try_shape(self, name: str, problems: list[str]) -> tuple[int, ...] | None:
        try:
            return self._shape(name)
        except (SafetensorError, KeyError):
            problems.append(f"{name} is not in {self._file_of[name]}, where the index says it is")
        return None


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    code = sorted(path.name for path in folder.glob("*.py"))
    if config.get("auto_map"):
        code.append("auto_map in config.json")
    if code:
        raise UserError(
            f"{folder} brings code of its own ({', '.join(code)}), which is never run here. If its "
            "weights are those of the plain architecture and you trust where it comes from, "
            f"say so by its name: --trust {folder.resolve().name}"
        )


def _files(folder: Path) -> dict[str, str]:
    """Return {tensor: file}; safetensors files are preferred to torch's format."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            file_of = _indexed_files(index)
            if (folder / stem).is_file() and stem not in file_of.values():
                raise UserError(
                    f"{folder} has both {stem} and other files named by {index.name}, which may be "
                    "two models: remove one of them"
                )
            return file_of
        if (folder / stem).is_file():
            tensors = _open(folder / stem)
            return dict.fromkeys(tensors if isinstance(tensors, dict) else tensors.keys(), stem)
    raise UserError(
        f"{folder} has no weights: "
        "neither model.safetensors nor pytorch_model.bin, nor an index of them"
    )


def _indexed_files(index: Path) -> dict[str, str]:
    """Return {tensor: file} from an index. Raises UserError where it is damaged or files lack."""
    file_of = read_own(index, _Index)["weight_map"]
    if unsafe := [file for file in file_of.values() if Path(file).name != file]:
        raise UserError(f"{index} names the file {unsafe[0]!r}: do not trust this folder")
    if missing := sorted(
        {file for file in file_of.values() if not (index.parent / file).is_file()}
    ):
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}, which its index names; download it again"
        )
    return file_of


def _open(path: Path):
    """Return a dictionary of tensors, or an open safetensors file."""
    refuse_link_out(path)
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut off ({error}); download it again") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch raises errors of many types: UnpicklingError, RuntimeError, EOFError, …
    except Exception as error:
        raise UserError(
            f"{path} holds more than tensors, or is damaged ({str(error).splitlines()[0]}); "
            "take the safetensors of this model"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise UserError(f"{path} holds no dictionary of tensors")
    return tensors
