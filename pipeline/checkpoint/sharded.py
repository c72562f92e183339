"""Save and load model and optimizer through megatron-core's dist_checkpointing, which reshards."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import ModuleList

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of, locate
from retemper.pipeline.checkpoint.state import TrainState, state_of
from retemper.pipeline.compat import safe_pickles
from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.distributed.collectives import barrier, broadcast_from_rank0, run_on_rank0
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.errors import UserError
from retemper.pipeline.model.adapter import is_adapter
from retemper.pipeline.model.lora import init_from_base
from retemper.pipeline.schema.run import Config

# Optimizer states in a form that loads at another TP, PP or DP; megatron's default form does not.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def write_checkpoint(
    run_dir: Path, step: int, sharded_state: dict, meta: dict, topology: Topology
) -> None:
    """Commit a sharded state dictionary as the checkpoint after `step` steps.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint.
        sharded_state: in the form of megatron-core's dist_checkpointing.
        meta: contents of meta.json, without hashes.
        topology: of this rank.

    Raises:
        UserError: a rank could not write, for instance to a full disk.

    Collective: every rank must call this.
    """
    temporary = Path(
        broadcast_from_rank0(str(commit.begin(run_dir, step)) if topology.rank == 0 else None)
    )
    try:
        dist_checkpointing.save(sharded_state, str(temporary))
    except CheckpointException as error:  # raised on every rank alike
        free = shutil.disk_usage(temporary).free >> 20
        raise UserError(
            f"{temporary} could not be written with {free} MiB free there ({_reason(error)}); "
            "the checkpoints before it are kept"
        ) from None
    barrier()
    if topology.rank == 0:
        commit.commit(run_dir, step, meta)
    barrier()


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores one run.

    With LoRA a checkpoint contains the adapters and their optimizer states, not the base.
    """

    config: Config
    topology: Topology
    model: ModuleList  # of this rank's stages
    optimizer: MegatronOptimizer | None  # None to load weights only
    fingerprints: dict[str, Any]  # of the data, and of the checkpoint the run started from

    def save(self, state: TrainState) -> None:
        """Commit a checkpoint after state.step steps.

        Collective: every rank must call this.
        """
        if self.config.parallel.overlap:
            for stage in self.model:
                # Otherwise only the next forward pass gathers the updated parameters.
                stage.start_param_sync(force_sync=True)
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
        """Load this run's newest committed checkpoint and return its train state.

        Without one, load that of the run it branches off, or the weights of init_from.

        Raises:
            UserError: a checkpoint is damaged, of another kind, or was made on other data or
                another base.

        Collective: every rank must call this.
        """
        steps = broadcast_from_rank0(commit.committed_steps(self.config.run_dir))
        if self.config.init_from and (
            self.config.method.name == "lora" or not (steps or self.config.branch_of)
        ):
            self._load_base(self.config.init_from)
        if steps:
            return self.load(steps[-1])
        if trunk := self.config.branch_of:
            return self.load(self.config.cooldown_begins(self.config.train.tokens), Path(trunk))
        return TrainState()

    def begin(self) -> None:
        """Load the weights of init_from; without it the run keeps its random initial weights.

        Collective: every rank must call this.
        """
        if self.config.init_from:
            self._load_base(self.config.init_from)

    def load(self, step: int, run_dir: Path | None = None) -> TrainState:
        """Load the checkpoint after `step` steps, and return its train state.

        With LoRA the base must have been loaded by `restore` or `begin`.

        Args:
            step: of the checkpoint.
            run_dir: of another run; None for this one.

        Raises:
            UserError: the checkpoint is damaged, or was made on other data or another base.

        Collective: every rank must call this.
        """
        folder = commit.folder_of(run_dir or self.config.run_dir, step)
        meta = verified_meta(folder)
        state = state_of(folder, meta)
        # Evaluation reads no training data: it may load checkpoints from before a change of data.
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
        loaded = _read(self._sharded_state(is_loading=True), folder)
        if self.config.fp8_recipe == "delayed":
            safe_pickles.trust_extra_state(_scaling_states(loaded["model"]), folder)
        self._fill_model(loaded["model"])
        if self.optimizer:
            self.optimizer.load_state_dict(loaded["optimizer"])
        return state

    def _allow(self, changes: list[str], folder: Path) -> None:
        """Raise UserError unless all changes are of the data, and data.allow_change is set."""
        only_data = all(change.startswith(("data.", "tokenizer:")) for change in changes)
        if only_data and self.config.data.allow_change:
            return
        listed = "\n".join(f"  - {change}" for change in changes)
        advice = "restore the old one or choose another name" + (
            "; data.allow_change=true goes on with the new data" if only_data else ""
        )
        raise UserError(
            f"{folder} was made with other inputs than this run's:\n{listed}\nTo go on, {advice}"
        )

    def _load_base(self, init_from: str) -> None:
        chosen = run_on_rank0(base_of, self.config, self.fingerprints["base"])
        # The same path may lead to other files on another node.
        base = locate(chosen, init_from, self.config.run_dir)
        folder = base.folder
        meta = run_on_rank0(base.read_meta)
        if meta["config"]["method"]["name"] != "full":
            raise UserError(
                f"init_from={init_from}: {folder} holds adapters, not a model; "
                "name a run with method=full"
            )
        model = meta["config"]["model"]
        if changes := changed_keys(model, self.config.model.model_dump(), "model."):
            raise UserError(
                f"init_from={init_from}: {folder} holds another model ({'; '.join(changes)}): "
                "set these keys to its values, which are listed first"
            )
        if meta["fingerprints"]["tokenizer"] != self.fingerprints["tokenizer"]:
            raise UserError(
                f"init_from={init_from}: {folder} was trained with another tokenizer "
                f"than {self.config.data.path}: set data.path to a corpus that was made with it, "
                "or tokenize the documents with it to another data.path"
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
        init_from_base(self.model)
        if self.optimizer:
            # Taken from the loaded weights: those in the model may be in FP8.
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
        """Return the part of the model's state that a checkpoint contains.

        It is the trainable parameters, and with delayed scaling the amax history.
        """
        delayed = self.config.fp8_recipe == "delayed"
        full = self.config.method.name == "full"

        def is_kept(key: str) -> bool:
            return delayed if _is_scaling(key) else full or is_adapter(key)

        return [
            {key: value for key, value in state.items() if is_kept(key)}
            for state in self._model_state()
        ]

    def _model_state(self) -> list[dict]:
        """Return the sharded state of each stage of this rank.

        The keys are local to a stage; the sharded tensors behind them have global names.
        """
        return [
            stage.sharded_state_dict(metadata=dict(METADATA))
            for stage in unwrap_model(list(self.model))
        ]

    def _fill_model(self, states: list[dict]) -> None:
        for stage, tensors, known in zip(
            unwrap_model(list(self.model)), states, self._model_state(), strict=True
        ):
            unknown = tensors.keys() - known.keys()
            assert not unknown, f"weights without a parameter: {unknown}"
            stage.load_state_dict(tensors, strict=False)


def _read(sharded_state: dict, folder: Path) -> dict:
    """Load a sharded state dictionary from a checkpoint; FP8 weights come dequantized.

    By default megatron-core reads FP8 weights part by part, and each part sets the scale that all
    parts share.

    Raises:
        UserError: a file is not what retemper writes.
    """
    with safe_pickles.reading(folder):
        FileSystemReader(folder).read_metadata()  # torch would report a refusal as "None"
        return dist_checkpointing.load(
            sharded_state,
            str(folder),
            sharded_strategy=TorchDistLoadShardedStrategy(stream_ckpt_dequant=False),
        )


def _scaling_states(states: list[dict]) -> list[Tensor]:
    """Return the FP8 scaling states of all layers of this rank."""
    return [
        state[key]
        for state in states
        for key in filter(_is_scaling, state)
        if isinstance(state[key], Tensor)
    ]


def _is_scaling(key: str) -> bool:
    """Return whether a key is the FP8 scaling state of a Transformer Engine layer.

    Layers in other precisions have such a key, too, with an empty value.
    """
    return key.endswith("_extra_state")


def _reason(error: CheckpointException) -> str:
    """Return the message of the first failing rank, which only the coordinating rank knows."""
    return next(
        (f"rank {rank}: {failure}" for rank, (failure, _traceback) in error.failures.items()),
        "another rank failed",
    )


def verified_meta(folder: Path) -> dict:
    """Call `commit.read_meta` on rank 0; return its result, or raise its error, on every rank.

    Collective: every rank must call this.
    """
    return run_on_rank0(commit.read_meta, folder)
