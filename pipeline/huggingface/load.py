"""Weights of a transformers folder into a model on its ranks, each reading what its shard holds; and the checkpoint they become."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from retemper.pipeline.checkpoint.commit import IMPORTED
from retemper.pipeline.checkpoint.sharded import METADATA, write_checkpoint
from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.huggingface.names import Shard
from retemper.pipeline.huggingface.source_config import TOKENIZER_FILES
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.model.build import build_layers
from retemper.pipeline.schema.model import ModelSetup

# What an import keeps of the folder it came from, for exports: the files beside the weights, and of each tensor its type.
ORIGIN, SOURCE = "huggingface", "source.json"


def import_weights(
    weights: Weights,
    name: str | None,
    setup: ModelSetup,
    topology: Topology,
    tokenizer_sha256: str,
    target: Path,
) -> None:
    """Commit the weights as the checkpoint of a run of zero steps, which any run can begin from.

    Every rank calls it.
    name: of the model on the hub, where it was given; adapters trained on it will name it.
    """
    stages = build_layers(setup, topology)
    for stage in stages:
        fill(
            stage,
            weights,
            Shard(setup.model, topology.tensor_parallel_rank, setup.parallel.tensor_parallel_size),
        )
    if topology.rank == 0:
        _keep_origin(weights, name, target / ORIGIN)
        replace_file(
            target / "config.json", json.dumps(setup.model_dump(), indent=2)
        )  # runs that begin here take its model
    meta = {
        "train_state": TrainState().to_dict(),
        "fingerprints": {"tokenizer": tokenizer_sha256},
        "config": setup.model_dump() | {"init_from": None},
        IMPORTED: weights.sha256 if topology.rank == 0 else None,  # rank 0 writes it
    }
    write_checkpoint(
        target,
        0,
        {"model": [stage.sharded_state_dict(metadata=dict(METADATA)) for stage in stages]},
        meta,
        topology,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, weights: Weights, shard: Shard) -> None:
    """Fill every parameter of this rank; rows of padding are zeros."""
    for name, parameter in _global_names(model):
        parameter.zero_()
        for block in shard.blocks(name, parameter.shape):
            parameter[block.here].copy_(weights.read(block.name, block.there))


def _global_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the number of their layer counted from the start of the model, whatever stage this is."""
    for name, parameter in model.named_parameters():
        if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            name = (
                f"decoder.layers.{model.decoder.layers[int(found[1])].layer_number - 1}.{found[2]}"
            )
        yield name, parameter


def _keep_origin(weights: Weights, hub_name: str | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (weights.folder / name).is_file():
            shutil.copyfile(weights.folder / name, folder / name)
    dtypes = {name: str(weights.dtype(name)).removeprefix("torch.") for name in weights.names}
    source = {"folder": str(weights.folder.resolve()), "name": hub_name, "dtypes": dtypes}
    (folder / SOURCE).write_text(json.dumps(source, indent=1))
