"""Redirections of megatron-core's hard-wired CUDA calls, for machines without CUDA.

With these redirections megatron-core 0.19 runs its real tensor, pipeline and data parallelism over
gloo. None of them changes what is computed: each is a device argument, a stream, a random state, a
type name or the choice of a kernel for CPU tensors.
`patch()` must run before megatron.core is imported; it runs once per process and does nothing if
CUDA is available.
"""

import contextlib
import functools
import os
import sys

import torch

# Factory functions that megatron-core calls with device="cuda".
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")

# Packages whose kernels many modules of megatron-core use whenever the import succeeds: for the
# optimizer, gradient norm and gradient clipping (transformer_engine, or apex with amp_C), for norm
# layers (apex), and for weight-gradient accumulation (apex's fused_weight_gradient_mlp_cuda).
_CUDA_ONLY = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
)

_patched = False


def patch() -> None:
    """Redirect megatron-core's CUDA calls to the CPU.

    Does nothing if CUDA is available; idempotent.
    """
    global _patched
    if _patched or torch.cuda.is_available():
        return
    _patched = True
    # megatron-core decorates its small fusions with torch.compile. Importing the compiler costs
    # 10 s per rank, and on CPU the compiled functions are no faster at the sizes used there.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch.compile = _no_compile
    _redirect_devices()
    _redirect_random_state()
    _redirect_streams()
    _redirect_types()
    _hide_cuda_packages()
    _redirect_megatron()


def _no_compile(function=None, **_options):
    return function if function is not None else (lambda f: f)


def _redirect_devices() -> None:
    def on_cpu(factory):
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapped

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _redirect_random_state() -> None:
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda._lazy_init = lambda: None
    torch.cuda._lazy_call = lambda call, **kwargs: call()


class _Immediate:
    """A stream or event of a device on which every call finishes before it returns."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _redirect_streams() -> None:
    torch.cuda.Stream = torch.cuda.Event = _Immediate
    torch.cuda.current_stream = torch.cuda.default_stream = _Immediate
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **kwargs: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _redirect_types() -> None:
    # The distributed optimizer tests `param.type() == "torch.cuda.FloatTensor"`.
    original = torch.Tensor.type

    def type_as_on_cuda(self, dtype=None, **kwargs):
        if dtype is not None:
            return original(self, dtype, **kwargs)
        return (
            original(self).replace("torch.", "torch.cuda.", 1)
            if self.device.type == "cpu"
            else original(self)
        )

    torch.Tensor.type = type_as_on_cuda


def _hide_cuda_packages() -> None:
    """Make imports of Transformer Engine and apex fail in this process, as if not installed.

    Both can be installed on a machine without a GPU, such as a login node, but their kernels accept
    CUDA tensors only. Without them megatron-core uses torch.
    """
    for name in _CUDA_ONLY:
        # None makes import raise ModuleNotFoundError, and find_spec find nothing.
        sys.modules[name] = None  # type: ignore[assignment]  # documented, but not in typeshed


def _redirect_megatron() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The original fork warns if the CPU state changes within it, but here it forks the CPU state.
    random.CudaRNGStatesTracker.fork = _fork
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


@contextlib.contextmanager
def _fork(self, name="model-parallel-rng"):
    outer = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state layout of Transformer Engine's FusedAdam, on torch's fused CPU kernel.

    megatron-core's distributed optimizer saves and reshards `exp_avg` and `exp_avg_sq` per
    parameter and `step` per group. torch.optim.AdamW keeps `step` per parameter, and the
    distributed optimizer cannot load that state again.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False):
        self.decoupled_weight_decay = adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        kernel = torch._fused_adamw_ if self.decoupled_weight_decay else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            kernel(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"])) for _ in params],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
