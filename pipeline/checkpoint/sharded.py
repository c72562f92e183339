"""Model and optimizer to and from a committed folder, through megatron-core's resharding dist_checkpointing."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import ModuleList

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of, locate
from retemper.pipeline.checkpoint.state import TrainState, state_of
from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.distributed.collectives import barrier, from_rank_zero, on_rank_zero
from retemper.pipeline.distributed.topology import Topology, trust_extra_state
from retemper.pipeline.errors import UserError
from retemper.pipeline.model.adapter import is_adapter
from retemper.pipeline.model.lora import begin_at_base
from retemper.pipeline.schema.run import Config

# Optimizer states that load at another TP, PP or DP; megatron's default cannot change the topology.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def write_checkpoint(
    run_dir: Path, step: int, sharded_state: dict, meta: dict, topology: Topology
) -> None:
    """Commit a sharded state dictionary as the checkpoint after `step` steps. Every rank calls it. Raises UserError on a full disk."""
    temporary = Path(
        from_rank_zero(str(commit.begin(run_dir, step)) if topology.rank == 0 else None)
    )
    try:
        dist_checkpointing.save(sharded_state, str(temporary))
    except CheckpointException as error:  # raised on every rank alike
        free = shutil.disk_usage(temporary).free >> 20
        raise UserError(
            f"{temporary} could not be written with {free} MiB free there ({_reason(error)}); the checkpoints before it are kept"
        ) from None
    barrier()
    if topology.rank == 0:
        commit.commit(run_dir, step, meta)
    barrier()


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores one run. With LoRA a checkpoint holds the adapters and their optimizer states, not the base."""

    config: Config
    topology: Topology
    model: ModuleList  # of this rank's stages
    optimizer: MegatronOptimizer | None  # None reads weights alone
    fingerprints: dict[str, Any]  # of the data, and of the checkpoint the run started from

    def save(self, state: TrainState) -> None:
        """Commit a checkpoint after state.step steps. Every rank calls it."""
        if self.config.parallel.overlap:
            for stage in self.model:
                stage.start_param_sync(
                    force_sync=True
                )  # else the next forward pass gathers what this step changed
        meta = {
            "train_state": state.to_dict(),
            "fingerprints": self.fingerprints,
            "config": self.config.model_dump(),
        }
        write_checkpoint(
            self.config.run_dir,
            state.step,
            self._sharded_state(is_loading=False),
            meta,
            self.topology,
        )

    def restore(self) -> TrainState:
        """Load this run's newest committed checkpoint; without one, that of the run it branches off, or the weights of init_from.

        Every rank calls it. Raises UserError where a checkpoint is damaged, of another kind, or was made on other data or another base.
        """
        steps = from_rank_zero(commit.committed_steps(self.config.run_dir))
        if self.config.init_from and (
            self.config.method.name == "lora" or not (steps or self.config.branch_of)
        ):
            self._load_base()
        if steps:
            return self.load(steps[-1])
        if trunk := self.config.branch_of:
            return self.load(self.config.cooldown_begins(self.config.train.tokens), Path(trunk))
        return TrainState()

    def begin(self) -> None:
        """Load the weights that the run begins with, where they are not drawn."""
        if self.config.init_from:
            self._load_base()

    def load(self, step: int, run_dir: Path | None = None) -> TrainState:
        """Load the checkpoint after `step` steps of this run, or of another (with LoRA: onto the base that restore or begin loaded)."""
        folder = commit.folder_of(run_dir or self.config.run_dir, step)
        meta = verified_meta(folder)
        state = state_of(folder, meta)
        # Scoring reads no training data: a checkpoint from before a change of it may be scored.
        compared = {
            name: value
            for name, value in self.fingerprints.items()
            if self.optimizer or name != "data"
        }
        if changes := changed_keys(
            {name: meta["fingerprints"].get(name) for name in compared}, compared
        ):
            self._allow(changes, folder)
            state.data_changes.append(
                {"step": step, "consumed_samples": state.consumed_samples, "difference": changes}
            )
        if self.config.fp8_recipe == "delayed":
            trust_extra_state()
        loaded = _read(self._sharded_state(is_loading=True), folder)
        self._fill_model(loaded["model"])
        if self.optimizer:
            self.optimizer.load_state_dict(loaded["optimizer"])
        return state

    def _allow(self, changes: list[str], folder: Path) -> None:
        """Refuse what is not the data's, and that unless it is allowed."""
        of_data = all(change.startswith(("data.", "tokenizer:")) for change in changes)
        if of_data and self.config.data.allow_change:
            return
        listed = "\n".join(f"  - {change}" for change in changes)
        advice = "restore the old one or choose another name" + (
            "; data.allow_change=true goes on with the new data" if of_data else ""
        )
        raise UserError(
            f"{folder} was made with other inputs than this run's:\n{listed}\nTo go on, {advice}"
        )

    def _load_base(self) -> None:
        init_from = self.config.init_from
        chosen = on_rank_zero(base_of, self.config, self.fingerprints["base"])
        # The same path may lead to other files on another node.
        base = locate(chosen, init_from, self.config.run_dir)
        folder = base.folder
        meta = on_rank_zero(base.read_meta)
        if meta["config"]["method"]["name"] != "full":
            raise UserError(
                f"init_from={init_from}: {folder} holds adapters, not a model; name a run with method=full"
            )
        if changes := changed_keys(meta["config"]["model"], self.config.model.model_dump()):
            raise UserError(
                f"init_from={init_from}: {folder} holds another model ({'; '.join(changes)}); set model.* to its shape"
            )
        if meta["fingerprints"]["tokenizer"] != self.fingerprints["tokenizer"]:
            raise UserError(
                f"init_from={init_from}: {folder} was trained with another tokenizer than {self.config.data.path}"
            )
        weights = [
            {
                key: value
                for key, value in state.items()
                if not (is_adapter(key) or _is_scaling(key))
            }
            for state in self._model_state()
        ]
        loaded = _read({"model": weights}, folder)["model"]
        self._fill_model(loaded)
        begin_at_base(self.model)
        if self.optimizer:
            # From what was read: the model's own may be in FP8.
            names = (
                ["model"]
                if len(loaded) == 1
                else [f"model{number}" for number in range(len(loaded))]
            )
            self.optimizer.reload_model_params(
                dict(zip(names, loaded, strict=True)) if self.config.fp8.param_gather else None
            )

    def _sharded_state(self, *, is_loading: bool) -> dict:
        model_state = self._trained_state()
        if not self.optimizer:
            return {"model": model_state}
        optimizer_state = self.optimizer.sharded_state_dict(
            {"model": model_state}, is_loading=is_loading, metadata=dict(METADATA)
        )
        return {"model": model_state, "optimizer": optimizer_state}

    def _trained_state(self) -> list[dict]:
        """What a checkpoint has of the model: what trains, and with delayed scaling the history that scales are taken from."""
        delayed = self.config.fp8_recipe == "delayed"
        full = self.config.method.name == "full"

        def is_kept(key: str) -> bool:
            return delayed if _is_scaling(key) else full or is_adapter(key)

        return [
            {key: value for key, value in state.items() if is_kept(key)}
            for state in self._model_state()
        ]

    def _model_state(self) -> list[dict]:
        """Of each stage of this rank: the names in it say nothing of other stages, what they stand for does."""
        return [
            stage.sharded_state_dict(metadata=dict(METADATA))
            for stage in unwrap_model(list(self.model))
        ]

    def _fill_model(self, states: list[dict]) -> None:
        for stage, tensors, known in zip(
            unwrap_model(list(self.model)), states, self._model_state(), strict=True
        ):
            unknown = tensors.keys() - known.keys()
            assert not unknown, f"weights that fit nowhere: {unknown}"
            stage.load_state_dict(tensors, strict=False)


def _read(sharded_state: dict, folder: Path) -> dict:
    """What a checkpoint holds of a sharded state dictionary; weights in FP8 come plain.

    By default megatron-core reads part after part into them, and each part sets the scale that all of them share.
    """
    return dist_checkpointing.load(
        sharded_state,
        str(folder),
        sharded_strategy=TorchDistLoadShardedStrategy(stream_ckpt_dequant=False),
    )


def _is_scaling(key: str) -> bool:
    """Whether a key of Transformer Engine's layers is the state of their FP8 scales. Other precisions have it too, and empty."""
    return key.endswith("_extra_state")


def _reason(error: CheckpointException) -> str:
    """The first failing rank's own words; only the coordinating rank knows them."""
    return next(
        (f"rank {rank}: {failure}" for rank, (failure, _traceback) in error.failures.items()),
        "another rank failed",
    )


def verified_meta(folder: Path) -> dict:
    """read_meta on rank 0, its result or its error on every rank."""
    return on_rank_zero(commit.read_meta, folder)
