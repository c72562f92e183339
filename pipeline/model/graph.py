"""The passes over a step's micro-batches, on a GPU optionally captured once as a CUDA graph.

A layer launches about a hundred small kernels, and the host takes longer to launch them than the
GPU to run them. A graph is launched as a whole. The memory that it reads and writes is fixed when
it is captured: the tensors of one micro-batch, into which the next one is copied, the weights, and
the buffers in which gradients are accumulated.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import get_model_config

from retemper.pipeline.config.rules import graph_conflicts
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.seeds import random_state_kept
from retemper.pipeline.model.adapted import forget_gradients, join_factors
from retemper.pipeline.model.forward import forward_step, run_pipeline, run_schedule
from retemper.pipeline.schema.run import Config

# Plain passes before the capture, in which libraries choose kernels, compile, and allocate memory
# that they keep.
_WARM_UP_PASSES = 3


class Passes:
    """Forward and backward passes over the micro-batches of a step, for one model.

    It is a context manager that frees the CUDA graph at the end.
    """

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
        """Add the micro-batches' gradients to the buffers, and reduce these over ranks.

        Returns:
            Dictionaries with loss, tokens and by_stream, as from run_schedule, on the last pipeline
            stage only: one for each micro-batch, or one for all of them together.

        Collective: every rank must call this.
        """
        if not self.recorded:
            return run_schedule(self.model, batches, forward_only=False)
        join_factors(list(self.model))
        if not self._replays:
            self._record(batches[0])
        self._loss.zero_()
        self._tokens.zero_()
        self._by_stream.zero_()
        for number, batch in enumerate(batches):
            self._load(batch)
            self._replays[min(number, len(self._replays) - 1)]()
        finalize = get_model_config(self.model[0]).finalize_model_grads_func
        finalize(list(self.model), self._tokens.clone())
        sums = {"loss": self._loss, "tokens": self._tokens, "by_stream": self._by_stream}
        return [{name: value.clone() for name, value in sums.items()}]

    def _record(self, batch: Batch) -> None:
        """Capture a pass over a micro-batch of this shape.

        Afterwards gradients and random states are as they were at the start of the step.
        """
        tensors = {
            name: value.clone()
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        self._batch = replace(batch, **tensors)
        device = tensors["tokens_BT"].device
        self._loss = torch.zeros((), device=device)
        self._tokens = torch.zeros((), dtype=torch.int, device=device)
        self._by_stream = torch.zeros(batch.streams, 2, dtype=torch.float64, device=device)
        with random_state_kept():
            for _ in range(_WARM_UP_PASSES):
                self._pass()
            self._replays.append(record(self._pass))
            if self._quantises_weights:
                # Only the first pass of a step quantizes the new weights to FP8, and overwrites
                # gradients instead of adding to them.
                with _without_weight_quantization(self.model[0]):
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
        with _without_gradient_reduction(self.model[0]):
            [output] = run_pipeline(self.model, [self._batch], forward_step, forward_only=False)
        self._loss += output["loss"]
        self._tokens += output["tokens"]
        self._by_stream += output["by_stream"]


def is_recorded(config: Config) -> bool:
    """Return whether this run's passes are replayed from a CUDA graph."""
    if config.train.cuda_graph == "auto":
        return torch.cuda.is_available() and not any(graph_conflicts(config)) and _is_tested(config)
    return config.train.cuda_graph == "on"


def _is_tested(config: Config) -> bool:
    """Return whether CUDA graphs of such runs are tested on a GPU (tests/gpu/test_runs.py).

    The tests compare the graph with the plain passes. Full training is excluded: it rarely waits
    for the host, so that a graph does not make it faster.
    """
    lora = config.method.lora
    parallel = config.parallel
    simple_layout = (
        parallel.tensor_parallel_size == parallel.context_parallel_size == 1
        and parallel.recompute in ("none", "swiglu")
    )
    return (
        simple_layout
        and lora is not None
        and not (lora.dropout or config.dropout.attention or config.dropout.hidden)
        and config.precision in ("bf16", "fp8_tensorwise")
    )


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Capture the kernels that a function launches on the current stream.

    Returns a function that launches them again.
    """
    graph = torch.cuda.CUDAGraph()
    # Torch registers the default generator only; dropout of sharded activations has another.
    for generator in get_cuda_rng_tracker().states_.values():
        graph.register_generator_state(generator)
    # Calls of other threads are not captured: they read data, and NCCL's watchdog queries events.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        function()
    return graph.replay


@contextlib.contextmanager
def _without_gradient_reduction(stage: torch.nn.Module) -> Iterator[None]:
    """Prevent megatron-core's schedule from reducing gradients within the context."""
    config = get_model_config(stage)
    finalize = config.finalize_model_grads_func
    config.finalize_model_grads_func = None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


@contextlib.contextmanager
def _without_weight_quantization(stage: torch.nn.Module) -> Iterator[None]:
    """Use existing FP8 copies of the weights within the context.

    A pass is then not the first one after a step of the optimizer.
    """
    stage.set_is_first_microbatch = lambda: None
    try:
        yield
    finally:
        del stage.set_is_first_microbatch
