"""Estimate memory, nodes, time, cost, checkpoints and data of a run before it starts.

The estimates are made by arithmetic only.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from retemper.pipeline.checkpoint.trunk import branches_of, check_against_trunk, not_here
from retemper.pipeline.config.schedules import ending
from retemper.pipeline.config.validate import check_config
from retemper.pipeline.corpus.format import TRAIN
from retemper.pipeline.corpus.manifest import find_manifest
from retemper.pipeline.data.streams import stream_paths
from retemper.pipeline.errors import UserError
from retemper.pipeline.estimate.flops import flops_per_token
from retemper.pipeline.estimate.gpus import peak_flops
from retemper.pipeline.estimate.memory import RankMemory, moments_of, parameter_counts, worst_rank
from retemper.pipeline.estimate.nodes import layout_of
from retemper.pipeline.estimate.rates import nearest
from retemper.pipeline.schema.run import Config

# Fraction of GPU memory for the CUDA context, NCCL buffers and fragmentation: an assumption.
_RESERVED = 0.1
# MFU where nothing similar to the run was measured: an assumption.
_ASSUMED_MFU = 0.4
# Of an H100, and the side of the tiles in which cuBLAS computes large products.
_MULTIPROCESSORS = 132
_TILE = 128


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for."""

    gpu: str
    gpu_memory: float  # GiB
    gpus_per_node: int
    mfu: float | None  # expected MFU; None: the MFU of a measurement
    price: float | None  # per GPU-hour

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu_memory * 2**30 * (1 - _RESERVED))


def plan(config: Config, machine: Machine) -> Iterator[str]:
    """Yield the lines of the plan.

    Raises:
        UserError: after the last line, if the run does not fit into memory; the message has the
            nearest layout that does. Also where a branch does not fit its trunk.
    """
    memory = worst_rank(config)
    trainable, frozen = parameter_counts(config)
    check_against_trunk(config)
    yield f"{config.study}/{config.name}: {trainable:,} trainable and {frozen:,} frozen parameters"
    yield from not_here(config)
    yield from _layout(config, machine)
    yield from _memory(memory, config, machine)
    yield from _time(config, machine)
    yield from _branches(config)
    yield _checkpoints(config)
    yield from _data(config)
    if memory.total > machine.usable_bytes:
        raise UserError(_does_not_fit(config, memory, machine))


def _layout(config: Config, machine: Machine) -> Iterator[str]:
    parallel = config.parallel
    layout = layout_of(config, machine.gpus_per_node)
    tp, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    yield (
        f"layout: {parallel.world_size} ranks on {layout.nodes} × {layout.ranks_per_node} GPUs: "
        f"tensor {tp} × pipeline {stages} × "
        f"context {parallel.context_parallel_size} × data {parallel.data_parallel_size}"
    )
    # megatron-core numbers ranks by tensor, context, data and pipeline position, the first fastest.
    ranks_per_stage = parallel.world_size // stages
    for stage in range(stages) if stages > 1 else ():
        first = stage * ranks_per_stage
        last = (stage + 1) * ranks_per_stage - 1
        nodes = f"{first // layout.ranks_per_node}" + (
            f"-{n}" if (n := last // layout.ranks_per_node) > first // layout.ranks_per_node else ""
        )
        yield f"  stage {stage}: ranks {first}-{last}, node {nodes}"
    if layout.nodes > 1 and layout.ranks_per_node % tp:
        yield (
            f"  warning: tensor parallelism crosses nodes: {tp} ranks on nodes of "
            f"{layout.ranks_per_node}; it needs the fast links within a node"
        )


def _memory(memory: RankMemory, config: Config, machine: Machine) -> Iterator[str]:
    where = (
        f", on the ranks of stage {memory.stage}"
        if config.parallel.pipeline_parallel_size > 1
        else ""
    )
    yield (
        f"memory: {_size(memory.total)} a GPU{where}; "
        f"{_size(machine.usable_bytes)} of {machine.gpu_memory:g} GiB can be used"
    )
    for kind in ("weights", "adapters", "gradients", "optimizer", "activations", "temporary"):
        if value := getattr(memory, kind):
            yield f"  {kind:<12}{_size(value):>12}  {value:>16,} bytes"


def _time(config: Config, machine: Machine) -> Iterator[str]:
    tokens = config.steps * config.tokens_per_step
    flops = flops_per_token(config.model, config.method.lora, config.data.seq_length)
    yield (
        f"length: {config.steps:,} steps of {config.tokens_per_step:,} tokens, "
        f"{tokens:,} in all; {flops / 1e9:.3g} GFLOP a token"
    )
    peak = peak_flops(machine.gpu, config.precision)
    if not peak:
        yield f"time: unknown: no peak FLOP/s of {machine.gpu} at precision={config.precision}"
        return
    if not machine.mfu and _fills_no_gpu(config):
        yield (
            "time: unknown: the matrices of this model and micro-batch are too small to fill a "
            "GPU, and nothing so small was measured; `--mfu FRACTION` assumes a speed"
        )
        return
    mfu, source = _mfu(config, machine)
    rate = mfu * peak * config.parallel.world_size / flops
    hours = tokens / rate / 3600
    gpu_hours = hours * config.parallel.world_size
    cost = f", {gpu_hours * machine.price:,.0f} at {machine.price:g} each" if machine.price else ""
    yield (
        f"time: {rate:,.0f} tokens/s at MFU {mfu:.3g} of {machine.gpu}'s "
        f"{peak / 1e12:,.0f} TFLOP/s: {_duration(hours)}, "
        f"{gpu_hours:,.1f} GPU-hours{cost}; saves and evaluations aside"
    )
    yield f"  {source}"


def _fills_no_gpu(config: Config) -> bool:
    """Return whether an output of hidden_size is fewer tiles than an H100 has multiprocessors."""
    tokens = config.train.micro_batch_size * config.data.seq_length
    tokens //= config.parallel.context_parallel_size
    return tokens * config.model.hidden_size < _MULTIPROCESSORS * _TILE**2


def _mfu(config: Config, machine: Machine) -> tuple[float, str]:
    """Return the expected MFU, and a line on its source."""
    if machine.mfu:
        return machine.mfu, "this MFU was asked for"
    measured = nearest(config, machine.gpu)
    if measured is None:
        return _ASSUMED_MFU, (
            f"this MFU is assumed: nothing was measured with method={config.method.name} "
            f"precision={config.precision} on a card like {machine.gpu}"
        )
    return measured.mfu, (
        f"this MFU was measured on one {measured.gpu} at commit {measured.commit[:7]}: "
        f"{measured.method}, {measured.precision}, Llama-2-7B's shape, {measured.tokens:,} tokens "
        "a micro-batch, without recomputation or communication"
    )


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def _branches(config: Config) -> Iterator[str]:
    """Yield a line on how a branch ends, and one for each branch of a trunk."""
    if config.branch_of:
        yield f"branch of {config.branch_of}: {ending(config)}"
    for branch in branches_of(config):
        yield f"branch {branch.name}: {branch.steps:,} steps; {ending(branch)}"


def _checkpoints(config: Config) -> str:
    count = len(config.saved_steps)
    size = checkpoint_bytes(config)
    adapters_only = ", adapters alone" if config.method.lora else ""
    return f"checkpoints: {count} of {_size(size)}{adapters_only}, {_size(count * size)} in all"


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of the tensors in one checkpoint.

    They are the trainable parameters in the precision of the model, and in float32 a copy of them
    and the optimizer's moments.
    """
    element = 4 if config.precision == "fp32" else 2  # FP8 weights too are saved as bf16
    return parameter_counts(config)[0] * (element + 4 + 4 * moments_of(config))


def _data(config: Config) -> Iterator[str]:
    needed = config.steps * config.train.global_batch_size
    window = config.data.mixture_window
    per_window = config.data.samples_per_window
    for name, path in stream_paths(config).items():
        samples = math.ceil(needed * per_window[name] / window)
        manifest = find_manifest(path)
        if not manifest:
            yield f"data: {name}: {samples:,} samples needed; {path} holds no token corpus yet"
            continue
        available = manifest["splits"][TRAIN]["samples"]
        epoch = available / per_window[name] * window / config.train.global_batch_size
        yield (
            f"data: {name}: {samples:,} samples needed, {available:,} in {path}: "
            f"{samples / available:.2f} epochs of {epoch:,.1f} steps"
        )


def _does_not_fit(config: Config, memory: RankMemory, machine: Machine) -> str:
    problem = (
        f"the run needs {_size(memory.total)} on a GPU, of whose {machine.gpu_memory:g} GiB "
        f"{_size(machine.usable_bytes)} can be used. "
    )
    ranks = config.parallel.world_size
    nearest = _nearest_that_fits(config, machine)
    if nearest is None:
        return problem + (
            "No tensor and pipeline size, recomputation or micro-batch makes it fit on "
            f"{ranks} GPU{'' if ranks == 1 else 's'}: "
            "take more of them (parallel.*_size), a shorter data.seq_length, or method=lora"
        )
    changes, fits = nearest
    overrides = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    return problem + f"On as many GPUs {_size(fits.total)} do with {overrides}"


_RECOMPUTE = ("none", "swiglu", "selective", "full")


def _nearest_that_fits(
    config: Config, machine: Machine
) -> tuple[dict[str, object], RankMemory] | None:
    """Return the changed keys and the memory of the nearest layout that fits, or None.

    The distance is the number of doublings of sizes and of steps of recomputation. At the same
    distance the layout with the smallest micro-batch is taken, which costs the least speed.
    """
    micro_batch = config.train.micro_batch_size
    for sizes, smaller in sorted(
        _grid(config, machine.gpus_per_node), key=lambda candidate: _distance(config, *candidate)
    ):
        sections = config.model_dump()
        sections["parallel"] |= sizes
        sections["train"]["micro_batch_size"] = smaller
        try:
            memory = worst_rank(check_config(sections))
        except UserError:  # an invalid layout
            continue
        if memory.total <= machine.usable_bytes:
            changed = {
                f"parallel.{key}": value
                for key, value in sizes.items()
                if value != getattr(config.parallel, key)
            }
            return changed | (
                {"train.micro_batch_size": smaller} if smaller != micro_batch else {}
            ), memory
    return None


def _grid(config: Config, gpus_per_node: int) -> Iterator[tuple[dict[str, object], int]]:
    """Yield parallel settings for the same number of ranks, each with a micro-batch size.

    Tensor parallelism stays within a node.
    """
    parallel = config.parallel
    ranks = parallel.world_size // parallel.context_parallel_size
    for tp, pp, recompute, micro_batch in itertools.product(
        _divisors(math.gcd(ranks, gpus_per_node)),
        _divisors(ranks),
        _RECOMPUTE,
        _divisors(config.train.micro_batch_size),
    ):
        if ranks % (tp * pp) == 0:
            sizes = {
                "tensor_parallel_size": tp,
                "pipeline_parallel_size": pp,
                "data_parallel_size": ranks // (tp * pp),
            }
            switches = {
                key: getattr(parallel, key) and tp > 1
                for key in ("sequence_parallel", "tensor_parallel_overlap")
            }
            yield sizes | switches | {"recompute": recompute}, micro_batch


def _distance(config: Config, sizes: dict, micro_batch: int) -> tuple[float, int]:
    keys = ("tensor_parallel_size", "pipeline_parallel_size")
    doublings = sum(abs(math.log2(sizes[key] / getattr(config.parallel, key))) for key in keys)
    doublings += math.log2(config.train.micro_batch_size / micro_batch)
    return doublings + abs(
        _RECOMPUTE.index(sizes["recompute"]) - _RECOMPUTE.index(config.parallel.recompute)
    ), micro_batch


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
