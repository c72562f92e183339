"""Load the weights of a transformers folder into a model, and commit them as a checkpoint.

Each rank reads only the blocks of its shard.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from retemper.pipeline.checkpoint.commit import IMPORTED
from retemper.pipeline.checkpoint.sharded import METADATA, write_checkpoint
from retemper.pipeline.checkpoint.state import TrainState
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.huggingface.names import Shard
from retemper.pipeline.huggingface.own_files import GENERATION, TOKENIZER_FILES, copy_files
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.model.build import build_layers
from retemper.pipeline.schema.model import ModelSetup

# The folder in which an import keeps the small files of its source for later exports, and the file
# with the type of each tensor.
ORIGIN, SOURCE = "huggingface", "source.json"


def import_weights(
    weights: Weights,
    name: str | None,
    setup: ModelSetup,
    topology: Topology,
    tokenizer_sha256: str,
    target: Path,
) -> None:
    """Commit the weights as the checkpoint of a run of zero steps, which any run can start from.

    Args:
        weights: of the transformers folder.
        name: of the model on the hub, where it came from there; adapters trained on it will name
            it as their base.
        setup: model, layout and precision.
        topology: of this rank.
        tokenizer_sha256: of the model's tokenizer.
        target: folder of the run.

    Collective: every rank must call this.
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
        # Runs that start from this checkpoint take their model from this file.
        replace_file(target / "config.json", json.dumps(setup.model_dump(), indent=2))
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
    """Fill every parameter of this rank; padding rows become zeros.

    Args:
        model: a pipeline stage.
        weights: to read from.
        shard: the tensor-parallel part of this rank.
    """
    for name, parameter in _global_names(model):
        parameter.zero_()
        for block in shard.blocks(name, parameter.shape):
            parameter[block.target_region].copy_(weights.read(block.name, block.source_region))


def _global_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield names and parameters, with layers numbered from the start of the model."""
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            name = (
                f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"
            )
        yield name, parameter


def _keep_origin(weights: Weights, hub_name: str | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(("config.json", GENERATION, *TOKENIZER_FILES), weights.folder, folder)
    dtypes = {name: str(weights.dtype(name)).removeprefix("torch.") for name in weights.names}
    source = {"folder": str(weights.folder.resolve()), "name": hub_name, "dtypes": dtypes}
    (folder / SOURCE).write_text(json.dumps(source, indent=1))
