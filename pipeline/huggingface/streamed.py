"""The model of a committed checkpoint on one rank, whatever the topology of its training was.

Weights are read from disk when they are needed.
"""

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
from retemper.pipeline.checkpoint.base import Base, base_of_checkpoint
from retemper.pipeline.checkpoint.sharded import METADATA, verified_meta
from retemper.pipeline.compat.safe_pickles import reading
from retemper.pipeline.distributed.collectives import run_on_rank0
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model.adapter import is_adapter
from retemper.pipeline.model.build import build_layers
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig


class StreamedModel:
    """A checkpoint whose parameters can be loaded by name, and whose model can run layer by layer.

    For a LoRA checkpoint it includes the base.
    """

    def __init__(self, run_dir: Path, step: int | None, topology: Topology):
        """Open and verify a checkpoint.

        Args:
            run_dir: folder of the run.
            step: of the checkpoint; None for the newest.
            topology: of this rank.

        Raises:
            UserError: the checkpoint or its base is missing, damaged or not the expected one.

        Collective: every rank must call this.
        """
        folder = commit.folder_of(run_dir, step) if step is not None else commit.newest(run_dir)
        self.folder = folder
        self.meta = verified_meta(folder)
        self.device = topology.device
        parallel = ParallelConfig(data_parallel_size=topology.data_parallel_size)
        self.setup = ModelSetup.of(self.meta["config"], parallel, precision="fp32")
        self.base: Base | None = None  # of the adapters
        if self.setup.method.name == "lora":
            self.base = base_of_checkpoint(folder, self.meta)
            assert self.base is not None, "method.name=lora requires init_from"
            run_on_rank0(self.base.read_meta)  # which checks its files
        with torch.device("meta"):
            [model] = build_layers(self.setup, topology)
        self.model = model.eval()
        self._sharded = self.model.sharded_state_dict(metadata=dict(METADATA))

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the order of a forward pass."""
        return [name for name, _ in self.model.named_parameters()]

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return {name: parameter in fp32 on the CPU}."""
        # Elements that are in no file are padding.
        loaded = {name: torch.zeros(self.model.get_parameter(name).shape) for name in names}
        base = self.base.folder if self.base else self.folder
        for folder, adapters in ((base, False), (self.folder, True)):
            wanted = {
                name: tensor for name, tensor in loaded.items() if is_adapter(name) == adapters
            }
            _read(
                folder,
                [pair for name, tensor in wanted.items() for pair in self._shards(name, tensor)],
            )
        return loaded

    def _shards(self, name: str, into: torch.Tensor) -> list[tuple[ShardedTensor, torch.Tensor]]:
        """Return a parameter's sharded tensors in the checkpoint, each with its part of `into`.

        There may be several: megatron-core stores gate and up as two tensors.
        """
        state = {name: self._sharded[name]}
        apply_factories(state)
        sharded = state[name] if isinstance(state[name], list) else [state[name]]
        return list(zip(sharded, into.chunk(len(sharded)), strict=True))

    @torch.no_grad()
    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, V) on the CPU, without the vocabulary's padding.

        Only one layer is in memory at a time.
        """
        with _loaded_on_demand(self):
            tokens_BT = tokens_BT.to(self.device)
            positions = torch.arange(tokens_BT.shape[1], device=self.device).expand_as(tokens_BT)
            return self.model(tokens_BT, positions, attention_mask=None)[
                ..., : self.setup.model.vocab_size
            ].cpu()


def _read(folder: Path, shards: list[tuple[ShardedTensor, torch.Tensor]]) -> None:
    """Fill tensors from a checkpoint.

    This uses torch's reader directly, because megatron-core can only load all layers of a stacked
    tensor or none.
    """
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
    with reading(folder):
        reader.read_data(LoadPlan(items), _Into(tensors)).wait()


class _Into(DefaultLoadPlanner):
    """The planner that tells torch's reader into which tensors to read."""

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
    """Load the modules of a model on the meta device before they run, and free them afterwards."""
    model = streamed.model
    hooks = []

    def load(part: torch.nn.Module, names: dict[str, str]) -> None:
        part.to_empty(device=streamed.device)
        for name, value in streamed.load(names).items():
            part.get_parameter(names[name]).copy_(value)

    def free(part, *_) -> None:
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
            hooks.append(part.register_forward_hook(free))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to("meta")
