"""The kernels available to a run: Transformer Engine's and apex's if installed, else torch's."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import ModelSetup
from retemper.pipeline.schema.run import Config

# The first version with block-wise FP8 scales and with functions that report whether a GPU supports
# a recipe.
_OLDEST_TRANSFORMER_ENGINE = (2, 9)


@dataclass(frozen=True)
class Kernels:
    """The accelerated kernels available on a rank."""

    gpu: str | None  # device name reported by CUDA
    transformer_engine: str | None  # version; None without a GPU
    # Whether NVIDIA's apex is installed, with its kernel for weight-gradient accumulation; False
    # without a GPU.
    apex: bool

    @property
    def fused_weight_gradients(self) -> bool:
        """Return whether weight gradients are accumulated by fused kernels.

        This requires apex: the output layer is megatron-core's own, and without apex's kernel for
        it no layer uses a fused one.
        """
        return self.apex

    def __str__(self) -> str:
        if not self.gpu:
            return "torch on CPU"
        used = []
        missing = []
        if self.transformer_engine:
            used.append(
                f"Transformer Engine {self.transformer_engine} "
                "(linear layers with their norms, attention, rotary embeddings, optimizer)"
            )
        else:
            missing.append(
                "Transformer Engine not found: no FP8, and linear layers, norms, attention and "
                "optimizer are torch's (pip install 'retemper[gpu]')"
            )
        if self.apex:
            used.append("apex (weight-gradient accumulation)")
        else:
            missing.append(
                "apex not found: weight-gradient accumulation is not fused (NVIDIA's image has it)"
            )
        return "; ".join(
            [
                f"{', '.join(used) or 'torch only'} on {self.gpu}",
                *missing,
            ]
        )


def detect_kernels() -> Kernels:
    """Return the accelerated kernels available on this rank."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    return Kernels(gpu, gpu and _transformer_engine_version(), bool(gpu and apex))


def check_precision(setup: ModelSetup) -> None:
    """Check, before any process group starts, that this rank can compute what the setup requires.

    Raises:
        UserError: If its GPU or libraries do not support the FP8 recipe or the tensor-parallel
            overlap.
    """
    if setup.fp8_recipe is None and not setup.parallel.tensor_parallel_overlap:
        return
    kernels = detect_kernels()
    setting = (
        f"precision={setup.precision}"
        if setup.fp8_recipe
        else "parallel.tensor_parallel_overlap=true"
    )
    alternative = (
        "set precision=bf16, which runs everywhere" if setup.fp8_recipe else "set it to false"
    )
    if not kernels.gpu:
        raise UserError(f"{setting} needs an NVIDIA GPU, and torch finds none here; {alternative}")
    if not kernels.transformer_engine:
        raise UserError(
            f"{setting} needs Transformer Engine, which is not installed "
            f"(pip install 'retemper[gpu]'); {alternative}"
        )
    if tuple(map(int, kernels.transformer_engine.split(".")[:2])) < _OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMER_ENGINE))
        raise UserError(
            f"{setting} needs Transformer Engine {oldest} or newer, but "
            f"{kernels.transformer_engine} is installed; {alternative}"
        )
    if setup.fp8_recipe:
        supported, reason = _recipe_support(setup.fp8_recipe)
        if not supported:
            because = f"{kernels.gpu}: {reason.rstrip('.')}"
            raise UserError(f"{setting} cannot run on {because}; {alternative}")


def check_graph(config: Config) -> None:
    """Check, before any process group starts, that there is a GPU if a CUDA graph is required.

    Raises:
        UserError: If train.cuda_graph=on and there is no GPU.
    """
    if config.train.cuda_graph == "on" and not detect_kernels().gpu:
        raise UserError(
            "train.cuda_graph=on needs an NVIDIA GPU, and torch finds none here; "
            "set train.cuda_graph=auto, which runs everywhere"
        )


def start_tensor_parallel_overlap(config: Config) -> None:
    """Allocate Transformer Engine's communication buffers for the overlap.

    Must be called before the layers are built. The buffers have the shape of a micro-batch.

    Collective: every rank must call this.
    """
    import transformer_engine_torch as tex
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
    if not tex.device_supports_multicast() and "UB_SKIPMC" not in os.environ:
        os.environ["UB_SKIPMC"] = "1"
        if torch.distributed.get_rank() == 0:
            print("tensor-parallel overlap: without multicast on this machine, by CUDA IPC")
    te.destroy_ub()  # buffers of a previous model
    te.initialize_ub(
        [tokens, config.model.hidden_size],
        config.parallel.tensor_parallel_size,
        quantization_modes=modes,
        bootstrap_backend="nccl",
    )


def _recipe_support(recipe: str) -> tuple[bool, str]:
    """Return whether this GPU supports an FP8 recipe, and if not, the reason."""
    from transformer_engine import pytorch as te

    is_available = {
        "mxfp8": te.is_mxfp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
    }.get(recipe, te.is_fp8_available)
    return is_available(return_reason=True)


def _transformer_engine_version() -> str | None:
    try:
        import transformer_engine.pytorch
    except ImportError:
        return None
    return transformer_engine.__version__
