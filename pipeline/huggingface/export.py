"""Export a checkpoint as files that unmodified transformers and peft can load.

Only the tensors of one output file are in memory at a time.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of_checkpoint
from retemper.pipeline.corpus.tokenizer import Tokenizer, is_hub_name
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import read_json
from retemper.pipeline.huggingface.load import ORIGIN, SOURCE
from retemper.pipeline.huggingface.names import LINEAR, Shard, tensor_shapes
from retemper.pipeline.huggingface.own_files import GENERATION, TOKENIZER_FILES, copy_files
from retemper.pipeline.huggingface.source_config import (
    config_of,
    model_of,
    read_config,
    readable_config,
    transformers_folder,
)
from retemper.pipeline.huggingface.streamed import StreamedModel
from retemper.pipeline.model.adapter import is_adapter, joined_factors, lora_scaling

_FILE_BYTES = 5 * 10**9  # the default shard size of transformers


README = "README.md"


class _Source(TypedDict):
    folder: str
    name: NotRequired[str | None]
    dtypes: dict[str, Annotated[str, Field(pattern=r"^b?float\d+$")]]


@dataclass(frozen=True)
class Rounding:
    """The number of a model's tensors that lost bits in an export."""

    tensors: int
    rounded: dict[str, int]  # by the type that they were rounded to
    reason: str  # why they have this type

    def __str__(self) -> str:
        if not self.rounded:
            return f"no weight was rounded (all {self.tensors} tensors are in {self.reason})"
        parts = [
            f"{count} of {self.tensors} tensors were rounded to {dtype}"
            for dtype, count in self.rounded.items()
        ]
        return f"{', '.join(parts)}: {self.reason}"


def export_model(streamed: StreamedModel, target: Path, tokenizer: Tokenizer) -> Rounding:
    """Write the whole model; LoRA adapters are merged into it in fp32.

    Args:
        streamed: the checkpoint.
        target: an empty folder.
        tokenizer: from `tokenizer_of`.

    Returns:
        Which weights had to be rounded.
    """
    origin = origin_of(streamed.folder, streamed.meta)
    source = _source_of(origin)
    dtype_of_run = "float32" if streamed.meta["config"]["precision"] == "fp32" else "bfloat16"
    dtypes = dict.fromkeys(tensor_shapes(streamed.setup.model), dtype_of_run)
    dtypes |= source.get("dtypes", {})
    rounded: Counter[str] = Counter()

    def typed() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _tensors(streamed):
            written = tensor.to(getattr(torch, dtypes[name]))
            if not torch.equal(written.float(), tensor):
                rounded[dtypes[name]] += 1
            yield name, written

    _write_index(_write_tensors(typed(), target), target)
    if origin:
        config = readable_config(origin)
        copy_files([GENERATION], origin, target)
    else:
        config = config_of(streamed.setup.model, dtype_of_run, _special_ids(tokenizer))
    (target / "config.json").write_text(json.dumps(config, indent=2))
    copy_files(TOKENIZER_FILES, tokenizer.folder, target)
    whose = "the model that was imported" if origin else "the run's precision"
    rounding = Rounding(len(dtypes), dict(rounded), f"the type of {whose}")
    kind = "A whole model for transformers."
    if streamed.setup.method.name == "lora":
        kind += " Adapters are merged into the weights."
    _write_readme(streamed, target, f"{kind} Rounding: {rounding}.")
    return rounding


def tokenizer_of(folder: Path, meta: dict[str, Any], named: str | None) -> Tokenizer:
    """Return the tokenizer that a model is exported with.

    It is that of the imported model it descends from, else the one named, else the run's.

    Args:
        folder: of the checkpoint.
        meta: its meta.json.
        named: by the user, with --tokenizer.

    Raises:
        UserError: it is missing, or not the one that the model was trained with.
    """
    origin = origin_of(folder, meta)
    name = str(origin) if origin else named or meta["config"]["data"]["tokenizer"]
    try:
        tokenizer = Tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{folder} is exported with its tokenizer, but {error}. Here it is named with "
            f"--tokenizer FOLDER"
        ) from None
    if tokenizer.sha256 != meta["fingerprints"].get("tokenizer", tokenizer.sha256):
        raise UserError(
            f"{name} is another tokenizer than the one that {folder} was trained with: name that "
            f"one with --tokenizer FOLDER"
        )
    return tokenizer


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {key: id for key, id in ids.items() if id is not None}


def _write_readme(streamed: StreamedModel, target: Path, what: str) -> None:
    run = streamed.folder.parent.parent.name
    step = streamed.meta["train_state"]["step"]
    (target / README).write_text(
        f"# {run}\n\nThe run {run} after step {step}, written by `retemper export`.\n\n{what}\n"
    )


def export_adapter(streamed: StreamedModel, target: Path, base: str) -> None:
    """Write only the adapters, in peft's format.

    Args:
        streamed: the checkpoint.
        target: an empty folder.
        base: the name or folder of the model that the adapters belong to.
    """
    base_name, _, revision = base.partition("@") if is_hub_name(base) else (base, "", "")
    lora = streamed.setup.method.adapters
    tensors = {}
    for module, adapter in _adapters(streamed.load(filter(is_adapter, streamed.names))).items():
        for name, tensor in zip(("lora_A", "lora_B"), joined_factors(adapter), strict=True):
            tensors[f"base_model.model.{module}.{name}.weight"] = tensor.contiguous()
        if lora.dora:
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = adapter["lora_magnitude"]
    _save(tensors, target / "adapter_model.safetensors")
    rank = lora.rank * (1 + lora.pissa)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": lora_scaling(lora) * (math.sqrt(rank) if lora.rslora else rank),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": [LINEAR[name].rpartition(".")[2] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
    if origin := origin_of(streamed.folder, streamed.meta):
        copy_files(TOKENIZER_FILES, origin, target)
    _write_readme(streamed, target, f"Adapters for peft, in float32, of the model {base}.")


def base_of(streamed: StreamedModel, base: str | None) -> tuple[str, Path]:
    """Return the name of the adapters' base in peft's config, and its transformers folder.

    Args:
        streamed: the checkpoint.
        base: a folder, or a name on the hub; by default what the base was imported as.

    Returns:
        The name, which for a folder is its absolute path, and the folder on this machine.

    Raises:
        UserError: no folder of the base is known, or it holds another model.
    """
    started_from = streamed.base
    if started_from is None:
        raise UserError(
            f"{streamed.folder} is of full training and holds no adapters: leave out --adapter"
        )
    origin = origin_of(streamed.folder, streamed.meta)
    source = _source_of(origin)
    name = base or source.get("name")
    folder = Path(source["folder"]) if origin else started_from.path
    if base and Path(base).exists():
        name = None
        folder = Path(base)
    elif name and not (origin and _is_model(folder)):
        folder = transformers_folder(name, f"the adapters' base {name}")
    if not _is_model(folder) or not (origin or base):
        raise UserError(
            f"{folder} is no transformers folder that is here: name that of the adapters' base, "
            f"{started_from}, with --base FOLDER, or make one: "
            f"retemper export {started_from.path} FOLDER --step {started_from.step}"
        )
    expected = tensor_shapes(streamed.setup.model)
    actual = tensor_shapes(model_of(read_config(folder), folder))
    if differing := sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    ):
        raise UserError(
            f"{folder} is not the adapters' base {started_from}: "
            f"{len(differing)} tensors are others, {differing[0]} among them"
        )
    return name or str(folder.resolve()), folder.resolve()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def origin_of(folder: Path, meta: dict[str, Any]) -> Path | None:
    """Return the folder with the files that an import kept of the model's transformers folder.

    Args:
        folder: of the checkpoint.
        meta: its meta.json.

    Returns:
        The folder, or None where the model does not descend from an imported one.
    """
    while not (folder.parent.parent / ORIGIN / SOURCE).is_file():
        base = base_of_checkpoint(folder, meta)
        if base is None:
            return None
        folder = base.folder
        meta = commit.sealed_meta(folder)
    return folder.parent.parent / ORIGIN


def _source_of(origin: Path | None) -> dict[str, Any]:
    """Return what an import recorded about its source; nothing for a model of no import."""
    return read_json(origin / SOURCE, _Source, "import the model again") if origin else {}


def _tensors(streamed: StreamedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (transformers' name, tensor in fp32) of the whole model, layer by layer."""
    shard = Shard(streamed.setup.model)
    shapes = tensor_shapes(streamed.setup.model)
    layers: dict[str, list[str]] = {}
    for name in streamed.names:
        layers.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for names in layers.values():
        loaded = streamed.load(names)
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in loaded.items():
            if is_adapter(name):
                continue
            for block in shard.blocks(name, parameter.shape):
                tensor = tensors.setdefault(block.name, torch.empty(shapes[block.name]))
                tensor[block.source_region] = parameter[block.target_region]
        for module, adapter in _adapters(loaded).items():
            tensors[f"{module}.weight"] = _merged(
                tensors[f"{module}.weight"], adapter, lora_scaling(streamed.setup.method.adapters)
            )
        yield from tensors.items()


def _merged(weight: torch.Tensor, adapter: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    A_RI, B_OR = joined_factors(adapter)
    merged = weight + scale * (B_OR @ A_RI)
    if "lora_magnitude" in adapter:
        merged *= (adapter["lora_magnitude"] / merged.norm(dim=1))[:, None]
    return merged


def _adapters(loaded: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return {transformers' linear module: the parameters of its adapter}."""
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name in filter(is_adapter, loaded):
        _, _, layer, *_, target, parameter = name.split(".")
        adapters.setdefault(f"model.layers.{layer}.{LINEAR[target]}", {})[parameter] = loaded[name]
    return adapters


def _write_tensors(
    tensors: Iterator[tuple[str, torch.Tensor]], target: Path
) -> list[dict[str, int]]:
    """Write numbered files of at most _FILE_BYTES, or of a single tensor that is larger.

    Returns:
        Of each file, {name: bytes} of its tensors.
    """
    files: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        _save(pending, target / f"{len(files):05d}.safetensors")
        files.append({name: tensor.nbytes for name, tensor in pending.items()})

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > _FILE_BYTES:
            write()
            pending = {}
            size = 0
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
    write()
    return files


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode  # by the umask; safetensors leaves its files to their owner alone
    try:
        save_file(tensors, file, {"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        raise UserError(f"{file} could not be written ({error}); nothing of it is left") from None


def _write_index(files: list[dict[str, int]], target: Path) -> None:
    """Rename the files to the names that transformers expects, and write their index."""
    if len(files) == 1:
        (target / "00000.safetensors").rename(target / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (target / f"{number:05d}.safetensors").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(names.values()) for names in files)
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )
