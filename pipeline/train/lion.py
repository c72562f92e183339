"""Lion, in the form megatron-core's distributed optimizer steps and saves: parameter groups with max_lr, a state of exp_avg."""

import torch


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675) with fully decoupled weight decay, as LLM Foundry's DecoupledLionW has it.

    Every group names lr, max_lr (its peak), betas and weight_decay. A step multiplies weights by 1 - lr / max_lr * weight_decay
    and moves each by lr.
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
                momentum = self.state[p]["exp_avg"]
                p.mul_(kept).add_(momentum.lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)
