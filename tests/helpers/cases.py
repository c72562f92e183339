"""Train a list of cases on one rank. conftest.launch runs it.

Cases of one layout that follow each other share their process groups, whose creation takes as long
as a short run. A case is {"overrides": [...]}, with the optional keys "stop_after": a step,
"fault": a name, "copy_of": the folder of a run that it continues, "refused": the message of the
error that ends it, and "graph": true, which lets train.cuda_graph=on run on a CPU. Its results are
its run folder.
"""

import contextlib
import shutil
import sys
from dataclasses import replace
from unittest import mock

import torch

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology
from retemper.pipeline.distributed.collectives import barrier
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ParallelConfig


class Stopped(Exception):
    """The run was interrupted on purpose."""


def main(cases: list[dict]) -> None:
    from retemper.pipeline.train import loop
    from retemper.pipeline.train.branches import train_with_branches

    layout = place = None
    for case in cases:
        config = load_config(case["overrides"])
        fingerprints = preflight(config)
        if layout != sizes_of(config.parallel):
            if place:
                topology.stop(leave=False)
            place = topology.start(config.parallel)
            layout = sizes_of(config.parallel)
        if "copy_of" in case and place.rank == 0:
            shutil.copytree(case["copy_of"], config.run_dir)
        barrier()
        with (
            FAULTS[case.get("fault")](),
            stand_in_graph() if case.get("graph") else contextlib.nullcontext(),
        ):
            try:
                with interruption(loop, case.get("stop_after")):
                    train_with_branches(config, place, fingerprints)
            except Stopped:
                pass
            except UserError as error:
                if "refused" not in case or case["refused"] not in str(error):
                    raise
    topology.stop(leave=False)


def sizes_of(parallel: ParallelConfig) -> dict[str, int]:
    """Return the sizes that determine the process groups."""
    return {name: size for name, size in parallel.model_dump().items() if name.endswith("_size")}


def stand_in_graph():
    """Call what a CUDA graph would replay; everything else about recorded passes is unchanged."""
    from retemper.pipeline.model import graph

    def record(function):
        function()
        return function

    return mock.patch.object(graph, "record", record)


def interruption(loop, stop_after: int | None):
    """Let the step after `stop_after` raise."""
    train_step, done = loop.train_step, []

    def step(*arguments):
        if len(done) == stop_after:
            raise Stopped
        done.append(1)
        return train_step(*arguments)

    return mock.patch.object(loop, "train_step", step)


def unreduced_adapter_gradient():
    """Inject a bug of several other projects.

    The gradient of the replicated LoRA factor is not summed over tensor-parallel ranks.
    """
    from retemper.pipeline.model import adapted

    def reduce(tensor, group, reduce=adapted.reduce_from_tensor_model_parallel_region):
        is_hidden_gradient = tensor.ndim == 2 and tensor.shape[1] <= 16
        return tensor if is_hidden_gradient else reduce(tensor, group=group)

    return mock.patch.object(adapted, "reduce_from_tensor_model_parallel_region", reduce)


def unmarked_adapter_factor():
    """Inject mcore-bridge #173.

    Under sequence parallelism the replicated factor's gradient is that of one part of the sequence.
    """
    from retemper.pipeline.model.adapter import is_adapter
    from retemper.pipeline.train import loop

    def build_model(config, place, build_model=loop.build_model):
        model = build_model(config, place)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.sequence_parallel = False
        return model

    return mock.patch.object(loop, "build_model", build_model)


def adapters_initialised_by_layout():
    """Inject Megatron-Bridge #5840: A is drawn differently for every tensor-parallel size."""
    from retemper.pipeline.model import build

    def init_weights(model, config, seed, init_weights=build.init_weights):
        init_weights(model, config, seed + model.config.tensor_model_parallel_size)

    return mock.patch.object(build, "init_weights", init_weights)


def adapter_shards_lost_at_save():
    """Inject Megatron-Bridge #2240.

    The checkpoint takes the sharded factor of one rank for the whole.
    """
    from retemper.pipeline.model import lora

    sharded = lora._sharded

    def as_if_replicated(layer, sharded_axis, *rest):
        return sharded(
            layer,
            {name: axis for name, axis in sharded_axis.items() if "adapters" not in name},
            *rest,
        )

    return mock.patch.object(lora, "_sharded", as_if_replicated)


def recompute_closed_to_gradients():
    """Inject Megatron-Bridge #1750.

    Adapters get no gradient if the layer's input, from a frozen embedding, does not require one.
    """
    from retemper.pipeline.model import lora

    return mock.patch.object(lora, "enable_input_require_grads", lambda embedding: None)


def qk_norm_of_own_heads():
    """Inject the kind of Megatron-LM #7452, finding 11.

    Without sequence parallelism, the gradient of a norm of heads is that of one rank's heads.
    """
    from retemper.pipeline.model import build

    def finalize(stages, *args, finalize=build.finalize_model_grads, **kwargs):
        with mock.patch.object(stages[0].config, "qk_layernorm", False):
            finalize(stages, *args, **kwargs)

    return mock.patch.object(build, "finalize_model_grads", finalize)


def shards_left_out_of_norm():
    """Inject the kind of Megatron-LM #7452, finding 8.

    The gradient norm counts a parameter that is sharded by heads on the first rank only.
    """
    from retemper.pipeline.train import loop

    def build_model(config, place, build_model=loop.build_model):
        model = build_model(config, place)
        for name, parameter in model.named_parameters():
            if name.endswith("linear_qkv.bias"):
                parameter.tensor_model_parallel = False
        return model

    return mock.patch.object(loop, "build_model", build_model)


def mean_over_own_tokens():
    """Inject Megatron-LM #7452, finding 9.

    Each rank averages the loss over its own labelled tokens, however many they are.
    """
    from retemper.pipeline.model import build

    def config_of(*args, config_of=build.transformer_config, **kwargs):
        transformer = config_of(*args, **kwargs)
        transformer.calculate_per_token_loss = False
        return transformer

    return mock.patch.object(build, "transformer_config", config_of)


def lost_optimizer_state():
    """Inject a restart that loses the optimizer's moments."""
    from retemper.pipeline.checkpoint.sharded import Checkpointer

    load = Checkpointer.load

    def forgetful(self, step):
        state = load(self, step)
        for optimizer_state in self.optimizer.optimizer.state.values():
            for moment in optimizer_state.values():
                moment.zero_()
        return state

    return mock.patch.object(Checkpointer, "load", forgetful)


def lost_data_position():
    """Inject a restart that reads the data from its beginning."""
    from retemper.pipeline.checkpoint.state import TrainState

    return mock.patch.object(TrainState, "samples_of_data", 0)


def another_seed():
    """Inject a restart that shuffles with another seed."""
    from retemper.pipeline.data import open_streams

    return mock.patch.object(open_streams, "derive_seed", lambda *parts: 1)


def lost_random_state():
    """Inject a restart whose dropout masks start again from the beginning."""
    from retemper.pipeline.train import loop

    seed_step = loop.seed_step
    return mock.patch.object(
        loop, "seed_step", lambda seed, step, place: seed_step(seed + 1, step, place)
    )


def nan_gradient():
    """Make one rank's gradients NaN in step 7."""
    from retemper.pipeline.train import loop

    def train_step(config, state, passes, optimizer, schedule, batches, train_step=loop.train_step):
        def prepare(prepare_grads=optimizer.prepare_grads):
            if state.step + 1 == 7 and torch.distributed.get_rank() == 1:
                passes.model[0].buffers[0].grad_data.fill_(float("nan"))
            return prepare_grads()

        with mock.patch.object(optimizer, "prepare_grads", prepare):
            return train_step(config, state, passes, optimizer, schedule, batches)

    return mock.patch.object(loop, "train_step", train_step)


def garbage_batch():
    """Make the labels of step 21 unrelated to its tokens."""
    from retemper.pipeline.train import loop

    def train_step(config, state, passes, optimizer, schedule, batches, train_step=loop.train_step):
        if state.step + 1 == 21:
            batches = [
                replace(batch, labels_BT=torch.full_like(batch.labels_BT, 299)) for batch in batches
            ]
        return train_step(config, state, passes, optimizer, schedule, batches)

    return mock.patch.object(loop, "train_step", train_step)


def no_labels():
    """Mask the loss of all tokens of the batches of steps 7 and 9."""
    from retemper.pipeline.train import loop

    def train_step(config, state, passes, optimizer, schedule, batches, train_step=loop.train_step):
        if state.step + 1 in (7, 9):
            batches = [
                replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
                for batch in batches
            ]
        return train_step(config, state, passes, optimizer, schedule, batches)

    return mock.patch.object(loop, "train_step", train_step)


@contextlib.contextmanager
def no_harness():
    """Make imports of lm-eval, and of what leads to it, fail."""
    barred = (
        "lm_eval",
        *(
            f"retemper.pipeline.evals.{name}"
            for name in ("team", "inline", "sharded_lm", "harness")
        ),
    )
    known = {name: sys.modules[name] for name in barred if name in sys.modules}
    sys.modules.update(dict.fromkeys(barred))
    try:
        yield
    finally:
        for name in barred:
            del sys.modules[name]
        sys.modules.update(known)


FAULTS = {
    None: contextlib.nullcontext,
    "unreduced_adapter_gradient": unreduced_adapter_gradient,
    "unmarked_adapter_factor": unmarked_adapter_factor,
    "adapters_initialised_by_layout": adapters_initialised_by_layout,
    "adapter_shards_lost_at_save": adapter_shards_lost_at_save,
    "recompute_closed_to_gradients": recompute_closed_to_gradients,
    "qk_norm_of_own_heads": qk_norm_of_own_heads,
    "shards_left_out_of_norm": shards_left_out_of_norm,
    "mean_over_own_tokens": mean_over_own_tokens,
    "lost_optimizer_state": lost_optimizer_state,
    "lost_data_position": lost_data_position,
    "another_seed": another_seed,
    "lost_random_state": lost_random_state,
    "nan_gradient": nan_gradient,
    "garbage_batch": garbage_batch,
    "no_labels": no_labels,
    "no_harness": no_harness,
}
