"""The passes of a step's micro-batches, on a GPU recorded once as a CUDA graph and replayed.

A layer launches a hundred small kernels, and the host takes longer to launch them than the GPU to run them. A graph is
launched whole. What it reads and writes stays where it was when it was recorded: one micro-batch's tensors, into which the
next is copied, the weights, and the buffers in which gradients are summed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from megatron.core.utils import get_model_config

from retemper.pipeline.config.rules import graph_conflicts
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.seeds import random_state_kept
from retemper.pipeline.model.adapted import forget_gradients, join_factors
from retemper.pipeline.model.forward import forward_step, run_schedule, through_stages
from retemper.pipeline.schema.run import Config

# Before it is recorded a pass runs as it is: libraries choose kernels, compile and allocate what they keep.
_WARM_UP_PASSES = 3


class Passes:
    """Forward and backward passes over the micro-batches of a step, for one model. A context manager, which frees the graph."""

    def __init__(self, config: Config, model: torch.nn.ModuleList):
        self.model = model
        self.recorded = is_recorded(config)
        self._quantises_weights = config.fp8_recipe is not None and config.method.name == "full"
        self._replays: list[Callable[[], None]] = []

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_error) -> None:
        self._replays.clear()

    def __call__(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        """Add the micro-batches' gradients to the buffers, and reduce those over ranks.

        Returns dictionaries with loss (sum of nats) and tokens (labels that count), on the last pipeline stage alone: one
        of each micro-batch, or of all of them together.
        """
        if not self.recorded:
            return run_schedule(self.model, batches, forward_only=False)
        join_factors(list(self.model))
        if not self._replays:
            self._record(batches[0])
        self._loss.zero_()
        self._tokens.zero_()
        for number, batch in enumerate(batches):
            self._load(batch)
            self._replays[min(number, len(self._replays) - 1)]()
        finalize = get_model_config(self.model[0]).finalize_model_grads_func
        finalize(list(self.model), self._tokens.clone())
        return [{"loss": self._loss.clone(), "tokens": self._tokens.clone()}]

    def _record(self, batch: Batch) -> None:
        """Record a pass over a micro-batch of this shape, and leave gradients and random states as they were at a step's start."""
        tensors = {
            name: value.clone()
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        self._batch = replace(batch, **tensors)
        self._loss = torch.zeros((), device=batch.tokens_BT.device)
        self._tokens = torch.zeros((), dtype=torch.int, device=batch.tokens_BT.device)
        with random_state_kept():
            for _ in range(_WARM_UP_PASSES):
                self._pass()
            self._replays.append(record(self._pass))
            if self._quantises_weights:
                # The first pass of a step makes FP8 weights of the new ones, and writes gradients where the others add.
                with _weights_unchanged(self.model[0]):
                    self._pass()
                    self._replays.append(record(self._pass))
        for stage in self.model:
            stage.zero_grad_buffer()
        forget_gradients(list(self.model))

    def _load(self, batch: Batch) -> None:
        for name, value in vars(self._batch).items():
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(batch, name), non_blocking=True)

    def _pass(self) -> None:
        with _gradients_left_alone(self.model[0]):
            [output] = through_stages(self.model, [self._batch], forward_step, forward_only=False)
        self._loss += output["loss"]
        self._tokens += output["tokens"]


def is_recorded(config: Config) -> bool:
    """Whether this run's passes are replayed from a graph."""
    if config.train.cuda_graph == "auto":
        return (
            torch.cuda.is_available() and not any(graph_conflicts(config)) and _was_compared(config)
        )
    return config.train.cuda_graph == "on"


def _was_compared(config: Config) -> bool:
    """Whether a graph of such a run was compared with its passes as they are, on a GPU (tests/gpu/test_runs.py).

    Full training waits little for the host, so that it wins nothing.
    """
    lora = config.method.lora
    parallel = config.parallel
    alone = (
        parallel.tensor_parallel_size == parallel.context_parallel_size == 1
        and parallel.recompute == "none"
    )
    return (
        alone
        and lora is not None
        and not lora.dropout
        and config.precision in ("bf16", "fp8_tensorwise")
    )


def record(function: Callable[[], None]) -> Callable[[], None]:
    """The kernels that a function launches on the current stream, to be launched again by a call."""
    graph = torch.cuda.CUDAGraph()
    # Other threads read data, and NCCL's watchdog asks for events: what they call is not recorded.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        function()
    return graph.replay


@contextlib.contextmanager
def _gradients_left_alone(stage: torch.nn.Module) -> Iterator[None]:
    """Within it megatron-core's schedule does not reduce gradients at the end of its micro-batches."""
    config = get_model_config(stage)
    finalize = config.finalize_model_grads_func
    config.finalize_model_grads_func = None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


@contextlib.contextmanager
def _weights_unchanged(stage: torch.nn.Module) -> Iterator[None]:
    """Within it a pass is not the first after a step of the optimizer: FP8 copies of weights are used as they are."""
    stage.set_is_first_microbatch = lambda: None
    try:
        yield
    finally:
        del stage.set_is_first_microbatch
