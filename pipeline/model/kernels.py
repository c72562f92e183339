"""Which kernels a run has here: Transformer Engine's and apex's where they are installed, torch's elsewhere."""

import importlib.util
from dataclasses import dataclass

import torch

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

# Since this version FP8 scales can be taken by block, and recipes say themselves whether a GPU can do them.
_OLDEST_TRANSFORMER_ENGINE = (2, 9)


@dataclass(frozen=True)
class Kernels:
    """What is at hand."""

    gpu: str | None  # as CUDA names it
    transformer_engine: str | None  # its version, on a GPU
    apex: bool  # on a GPU, and NVIDIA's: with its kernel that adds weight gradients where they are summed

    @property
    def fused_weight_gradients(self) -> bool:
        """The output layer is megatron-core's own, whose weight gradient takes apex's kernel or none of the layers takes a fused one."""
        return self.apex

    def __str__(self) -> str:
        if not self.gpu:
            return "torch's on CPU"
        used = []
        lacking = []
        if self.transformer_engine:
            used.append(
                f"Transformer Engine {self.transformer_engine} (linear layers with their norms, attention, rotations, optimizer)"
            )
        else:
            lacking.append(
                "Transformer Engine: no FP8, and linear layers, norms, attention and optimizer are torch's (pip install 'retemper[gpu]')"
            )
        if self.apex:
            used.append("apex (sums of weight gradients)")
        else:
            lacking.append(
                "apex: sums of weight gradients are a kernel of their own (NVIDIA's image has it)"
            )
        return "; ".join(
            [
                f"{', '.join(used) or 'torch alone'} on {self.gpu}",
                *(f"without {part}" for part in lacking),
            ]
        )


def kernels_here() -> Kernels:
    """Of this rank."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    return Kernels(gpu, gpu and _transformer_engine_version(), bool(gpu and apex))


def check_precision(setup: ModelSetup) -> None:
    """Refuse what this rank's hardware or its libraries cannot compute, before any process group starts. Raises UserError."""
    if setup.fp8_recipe is None and not setup.parallel.tensor_parallel_overlap:
        return
    kernels = kernels_here()
    asked = (
        f"precision={setup.precision}"
        if setup.fp8_recipe
        else "parallel.tensor_parallel_overlap=true"
    )
    instead = "precision=bf16 runs everywhere" if setup.fp8_recipe else "set it to false"
    if not kernels.gpu:
        raise UserError(f"{asked} needs an NVIDIA GPU, and torch finds none here; {instead}")
    if not kernels.transformer_engine:
        raise UserError(
            f"{asked} needs Transformer Engine, which is not installed (pip install 'retemper[gpu]'); {instead}"
        )
    if tuple(map(int, kernels.transformer_engine.split(".")[:2])) < _OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMER_ENGINE))
        raise UserError(
            f"{asked} needs Transformer Engine {oldest} or newer, here is {kernels.transformer_engine}; {instead}"
        )
    if setup.fp8_recipe:
        can, why_not = _can(setup.fp8_recipe)
        if not can:
            raise UserError(f"{asked} cannot run on {kernels.gpu}: {why_not} {instead}")


def check_graph(config: Config) -> None:
    """Refuse a CUDA graph where there is no GPU, before any process group starts. Raises UserError."""
    if config.train.cuda_graph == "on" and not kernels_here().gpu:
        raise UserError(
            "train.cuda_graph=on needs an NVIDIA GPU, and torch finds none here; auto runs everywhere"
        )


def start_tensor_parallel_overlap(config: Config) -> None:
    """Reserve Transformer Engine's buffers for it, which have the shape of a micro-batch. Before the layers are built."""
    from transformer_engine import pytorch as te
    from transformer_engine.pytorch.module import UserBufferQuantizationMode as Mode

    modes = [Mode.FP8] if config.fp8_recipe else []
    if not config.fp8_recipe or config.fp8.bf16_layers:
        modes.append(Mode.NONE)
    tokens = (
        config.train.micro_batch_size
        * config.data.seq_length
        // config.parallel.context_parallel_size
    )
    te.destroy_ub()  # those of a model before
    te.initialize_ub(
        [tokens, config.model.hidden_size],
        config.parallel.tensor_parallel_size,
        quantization_modes=modes,
        bootstrap_backend="nccl",
    )


def _can(recipe: str) -> tuple[bool, str]:
    from transformer_engine import pytorch as te

    asks = {"mxfp8": te.is_mxfp8_available, "blockwise": te.is_fp8_block_scaling_available}.get(
        recipe, te.is_fp8_available
    )
    return asks(return_reason=True)


def _transformer_engine_version() -> str | None:
    try:
        import transformer_engine.pytorch
    except ImportError:
        return None
    return transformer_engine.__version__
