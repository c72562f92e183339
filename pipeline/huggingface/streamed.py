"""The model of a committed checkpoint on one rank, whatever its topology was: weights come from disk when they are needed."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of_checkpoint
from retemper.pipeline.checkpoint.sharded import METADATA, verified_meta
from retemper.pipeline.distributed.collectives import on_rank_zero
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model.adapter import is_adapter
from retemper.pipeline.model.build import build_layers
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig


class StreamedModel:
    """A checkpoint, and with LoRA the base under it, as parameters to load by name and as a model to run layer by layer."""

    def __init__(self, run_dir: Path, step: int | None, topology: Topology):
        """step: of the checkpoint, by default the newest. Raises UserError where it, or its base, is missing, damaged or another."""
        folder = commit.folder_of(run_dir, step) if step is not None else commit.newest(run_dir)
        self.folder = folder
        self.meta = verified_meta(folder)
        self.device = topology.device
        parallel = ParallelConfig(data_parallel_size=topology.data_parallel_size)
        self.setup = ModelSetup.of(self.meta["config"], parallel, precision="fp32")
        self.base = None  # under adapters
        if self.setup.method.name == "lora":
            self.base = base_of_checkpoint(folder, self.meta)
            on_rank_zero(self.base.read_meta)  # which checks its files
        with torch.device("meta"):
            [model] = build_layers(self.setup, topology)
        self.model = model.eval()
        self._sharded = self.model.sharded_state_dict(metadata=dict(METADATA))

    @property
    def names(self) -> list[str]:
        """The parameters, in the order in which a forward pass meets them."""
        return [name for name, _ in self.model.named_parameters()]

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Parameters in fp32 on the CPU."""
        loaded = {
            name: torch.zeros(self.model.get_parameter(name).shape) for name in names
        }  # what stands in no file is padding
        base = self.base.folder if self.base else self.folder
        for folder, of_adapters in ((base, False), (self.folder, True)):
            wanted = {
                name: tensor for name, tensor in loaded.items() if is_adapter(name) == of_adapters
            }
            _read(
                folder,
                [pair for name, tensor in wanted.items() for pair in self._shards(name, tensor)],
            )
        return loaded

    def _shards(self, name: str, into: torch.Tensor) -> list[tuple[ShardedTensor, torch.Tensor]]:
        """How the checkpoint knows a parameter, and the part of it that each shard is: megatron-core stores gate and up as two."""
        state = {name: self._sharded[name]}
        apply_factories(state)
        sharded = state[name] if isinstance(state[name], list) else [state[name]]
        return list(zip(sharded, into.chunk(len(sharded)), strict=True))

    @torch.no_grad()
    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits of the vocabulary without its padding, (B, T, V) on the CPU, with one layer in memory at a time."""
        with _loaded_on_demand(self):
            tokens_BT = tokens_BT.to(self.device)
            positions = torch.arange(tokens_BT.shape[1], device=self.device).expand_as(tokens_BT)
            return self.model(tokens_BT, positions, attention_mask=None)[
                ..., : self.setup.model.vocab_size
            ].cpu()


def _read(folder: Path, shards: list[tuple[ShardedTensor, torch.Tensor]]) -> None:
    """Fill tensors from a checkpoint. megatron-core loads all of a stacked tensor's layers or none: this is torch's reader under it."""
    reader = FileSystemReader(folder)
    tensors = {}
    items = []
    metadata = reader.read_metadata()
    for shard, into in shards:
        offset = torch.Size(shard.global_offset)
        size = torch.Size([*(1,) * shard.prepend_axis_num, *shard.local_shape])
        tensors[shard.key, offset] = into.view(size)
        stored = metadata.state_dict_metadata[shard.key]
        items += create_read_items_for_chunk_list(
            shard.key, stored, [ChunkStorageMetadata(offset, size)]
        )
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(LoadPlan(items), _Into(tensors)).wait()


class _Into(DefaultLoadPlanner):
    """Where torch's reader puts what it reads."""

    def __init__(self, tensors: dict[tuple[str, torch.Size], torch.Tensor]):
        super().__init__()
        self.tensors = tensors

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self.tensors[read_item.dest_index.fqn, read_item.dest_index.offset]
        return narrow_tensor_by_index(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


@contextlib.contextmanager
def _loaded_on_demand(streamed: StreamedModel) -> Iterator[None]:
    """Within it, the parts of a model that has no memory are loaded when they run, and forgotten after."""
    model = streamed.model
    hooks = []

    def load(part: torch.nn.Module, names: dict[str, str]) -> None:
        part.to_empty(device=streamed.device)
        for name, value in streamed.load(names).items():
            part.get_parameter(names[name]).copy_(value)

    def forget(part, *_) -> None:
        part.to("meta")

    for name, part in model.named_modules():
        if not re.fullmatch(
            r"embedding|decoder\.layers\.\d+|decoder\.final_layernorm|output_layer", name
        ):
            continue
        names = {f"{name}.{inner}": inner for inner, _ in part.named_parameters()}
        if not names:
            continue  # the head of tied embeddings
        hooks.append(part.register_forward_pre_hook(lambda part, _, names=names: load(part, names)))
        if name != "embedding" or not streamed.setup.model.tie_embeddings:
            hooks.append(part.register_forward_hook(forget))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to("meta")
