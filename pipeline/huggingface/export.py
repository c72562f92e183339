"""A checkpoint as files that stock transformers and peft load. Tensors pass through memory one output file at a time."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface.config import config_of, model_of, read_config
from retemper.pipeline.huggingface.folder import TOKENIZER_FILES
from retemper.pipeline.huggingface.load import ORIGIN, SOURCE
from retemper.pipeline.huggingface.names import LINEAR, Shard, tensor_shapes
from retemper.pipeline.huggingface.streamed import StreamedModel
from retemper.pipeline.model.adapter import is_adapter, joined_factors, scale_of

_FILE_BYTES = 5 * 10**9  # as transformers cuts its shards


def export_model(streamed: StreamedModel, target: Path, tokenizer: Path | None) -> bool:
    """Write the whole model, with LoRA the adapters merged into it in fp32. Returns whether the weights had to be rounded.

    target: an empty folder. tokenizer: the folder of one, for a model that was never imported.
    """
    origin = origin_of(streamed)
    source = json.loads((origin / SOURCE).read_text()) if origin else {}
    dtype_of_run = "float32" if streamed.meta["config"]["precision"] == "fp32" else "bfloat16"
    dtypes = source.get("dtypes") or dict.fromkeys(tensor_shapes(streamed.setup.model), dtype_of_run)
    rounded = False

    def typed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal rounded
        for name, tensor in _tensors(streamed):
            written = tensor.to(getattr(torch, dtypes[name]))
            rounded |= not torch.equal(written.float(), tensor)
            yield name, written

    _write_index(_write_tensors(typed(), target), target)
    if origin:
        _copy(("config.json", "generation_config.json"), origin, target)
    else:
        (target / "config.json").write_text(json.dumps(config_of(streamed.setup.model, dtype_of_run), indent=2))
    _copy(TOKENIZER_FILES, origin or tokenizer or Path(streamed.meta["config"]["data"]["tokenizer"]), target)
    return rounded


def export_adapter(streamed: StreamedModel, target: Path, base: str) -> None:
    """Write the adapters alone, as peft has them. base: the name or folder of the model they belong to."""
    lora, tensors = streamed.setup.method.lora, {}
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
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale_of(lora) * (math.sqrt(rank) if lora.rslora else rank),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": [LINEAR[name].rpartition(".")[2] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
    if origin := origin_of(streamed):
        _copy(TOKENIZER_FILES, origin, target)


def reference_of(streamed: StreamedModel, base: str | None) -> Path:
    """The transformers folder of the base that adapters stand on. Raises UserError where none is known."""
    if streamed.setup.method.name != "lora":
        raise UserError(f"{streamed.folder} is of full training and holds no adapters: leave out --adapter")
    origin = origin_of(streamed)
    folder = Path(base or (json.loads((origin / SOURCE).read_text())["folder"] if origin else streamed.base_dir))
    if not (folder / "config.json").is_file() or not origin and not base:
        raise UserError(
            f"{folder} is no transformers folder that is here: name that of the adapters' base {streamed.base_dir} with --base FOLDER, "
            f"or make one: retemper export {streamed.base_dir} FOLDER"
        )
    wanted, there = tensor_shapes(streamed.setup.model), tensor_shapes(model_of(read_config(folder), folder))
    if other := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        raise UserError(f"{folder} is not the adapters' base {streamed.base_dir}: {len(other)} tensors are others, {other[0]} among them")
    return folder.resolve()


def origin_of(streamed: StreamedModel) -> Path | None:
    """What an import kept of the transformers folder that this model descends from; None where it descends from none."""
    folder, config = streamed.folder, streamed.meta["config"]
    while not (folder.parent.parent / ORIGIN / SOURCE).is_file():
        if not config["init_from"]:
            return None
        folder = commit.newest(Path(config["init_from"]))
        config = json.loads((folder / commit.META).read_text())["config"]
    return folder.parent.parent / ORIGIN


def _tensors(streamed: StreamedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, tensor in fp32) of the whole model, layer by layer."""
    shard, shapes = Shard(streamed.setup.model), tensor_shapes(streamed.setup.model)
    layers: dict[str, list[str]] = {}
    for name in streamed.names:
        layers.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for names in layers.values():
        loaded, tensors = streamed.load(names), {}
        for name, parameter in loaded.items():
            if is_adapter(name):
                continue
            for block in shard.blocks(name, parameter.shape):
                tensor = tensors.setdefault(block.name, torch.empty(shapes[block.name]))
                tensor[block.there] = parameter[block.here]
        for module, adapter in _adapters(loaded).items():
            tensors[f"{module}.weight"] = _merged(tensors[f"{module}.weight"], adapter, scale_of(streamed.setup.method.lora))
        yield from tensors.items()


def _merged(weight: torch.Tensor, adapter: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    A_RI, B_OR = joined_factors(adapter)
    merged = weight + scale * (B_OR @ A_RI)
    if "lora_magnitude" in adapter:
        merged *= (adapter["lora_magnitude"] / merged.norm(dim=1))[:, None]
    return merged


def _adapters(loaded: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """transformers' linear module -> the parameters of its adapter."""
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name in filter(is_adapter, loaded):
        _, _, layer, *_, target, parameter = name.split(".")
        adapters.setdefault(f"model.layers.{layer}.{LINEAR[target]}", {})[parameter] = loaded[name]
    return adapters


def _write_tensors(tensors: Iterator[tuple[str, torch.Tensor]], target: Path) -> list[dict[str, Any]]:
    """Numbered files of at most _FILE_BYTES, or of one tensor that is larger; returns name -> bytes of each."""
    files, held, size = [], {}, 0

    def write() -> None:
        _save(held, target / f"{len(files):05d}.safetensors")
        files.append({name: tensor.nbytes for name, tensor in held.items()})

    for name, tensor in tensors:
        if held and size + tensor.nbytes > _FILE_BYTES:
            write()
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
    write()
    return files


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{file} could not be written ({error}); nothing of it is left") from None


def _write_index(files: list[dict[str, int]], target: Path) -> None:
    """Give the files the names that transformers expects."""
    if len(files) == 1:
        (target / "00000.safetensors").rename(target / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (target / f"{number:05d}.safetensors").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(names.values()) for names in files)
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
