"""The Lion optimizer, in the form that megatron-core's distributed optimizer can step and save.

Its parameter groups have the key max_lr; its state is exp_avg.
"""

import functools
import importlib.util

import torch


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675) with fully decoupled weight decay.

    The decay is that of LLM Foundry's DecoupledLionW. Every parameter group has the keys lr, max_lr
    (the peak learning rate), betas and weight_decay. A step multiplies weights by
    1 - lr / max_lr * weight_decay and moves each by lr. On CUDA, where Triton is installed, the
    step of a parameter is one kernel.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            kept = 1 - group["lr"] / group["max_lr"] * group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                lion_step = _step_on_cuda() if p.is_cuda else plain_step
                lion_step(p, p.grad, self.state[p]["exp_avg"], kept, group["lr"], beta1, beta2)


def plain_step(
    p: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    kept: float,
    lr: float,
    beta1: float,
    beta2: float,
) -> None:
    """Apply one step to a parameter and its momentum, in place.

    Args:
        p: is multiplied by `kept`, then moved by `lr` against the sign of the update direction.
        grad: its gradient, of the same shape.
        momentum: its exp_avg, of the same shape.
        kept: the factor that weight decay leaves of p.
        lr: learning rate.
        beta1: interpolates momentum and gradient for the update direction.
        beta2: interpolates momentum and gradient for the next momentum.
    """
    p.mul_(kept).add_(momentum.lerp(grad, 1 - beta1).sign_(), alpha=-lr)
    momentum.lerp_(grad, 1 - beta2)


@functools.cache
def _step_on_cuda():
    """Return the step with the Triton kernel, or `plain_step` where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return plain_step
    from retemper.pipeline.train.lion_triton import lion_step

    return lion_step
