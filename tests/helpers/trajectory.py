"""Check optimizers: every step against a plain one of a single process. probes.py runs it."""

from unittest import mock

import pytest
import torch

from retemper.pipeline.train.norms import kind_of, norms_of_step


class Plain:
    """The optimizer of a run in one process, over copies of whole weights.

    Biases and norms are not decayed.
    """

    def __init__(self, config, weights: dict[tuple, torch.Tensor]):
        self.settings, ratio = (
            config.optimizer,
            config.method.lora.lr_ratio if config.method.lora else 1.0,
        )
        self.weights = {key: weight.float().clone() for key, weight in weights.items()}
        self.groups = [
            {
                "params": [weight],
                "ratio": ratio if key[-1].endswith(".lora_B") else 1.0,
                "weight_decay": self.settings.weight_decay if weight.ndim > 1 else 0.0,
                "momentum": torch.zeros_like(weight),
            }
            for key, weight in self.weights.items()
        ]
        self.adamw = torch.optim.AdamW(
            self.groups, betas=(self.settings.beta1, self.settings.beta2), eps=self.settings.eps
        )

    def step(self, gradients: dict[tuple, torch.Tensor], lr: float) -> None:
        for group, gradient in zip(self.adamw.param_groups, gradients.values(), strict=True):
            group["lr"], group["params"][0].grad = lr * group["ratio"], gradient
        if self.settings.name == "adamw":
            self.adamw.step()
        else:
            self.lion(lr / self.settings.lr)

    def norms_since(self, before: dict[tuple, torch.Tensor]) -> dict[str, float]:
        """Return the norms of weights and of their update, by kind."""
        norms = {}
        for kind in {kind_of(key[-1]) for key in before}:
            of_kind = [key for key in before if kind_of(key[-1]) == kind]
            norms[f"parameter_norm/{kind}"] = (
                torch.cat([self.weights[key].flatten() for key in of_kind]).norm().item()
            )
            norms[f"update_norm/{kind}"] = (
                torch.cat([(self.weights[key] - before[key]).flatten() for key in of_kind])
                .norm()
                .item()
            )
        return norms

    def lion(self, part_of_peak: float) -> None:
        for group in self.adamw.param_groups:
            (weight,), momentum = group["params"], group["momentum"]
            direction = torch.sign(torch.lerp(momentum, weight.grad, 1 - self.settings.beta1))
            weight -= part_of_peak * group["weight_decay"] * weight
            weight -= group["lr"] * direction
            momentum.copy_(torch.lerp(momentum, weight.grad, 1 - self.settings.beta2))


def trained_parameters(place, model) -> dict[tuple, torch.nn.Parameter]:
    """Return the trainable parameters by pipeline rank, stage, tensor-parallel rank and name.

    The tensor-parallel rank in the key of a replicated parameter is 0.
    """
    return {
        (
            place.pipeline_parallel_rank,
            number,
            place.tensor_parallel_rank if getattr(p, "tensor_model_parallel", False) else 0,
            name,
        ): p
        for number, stage in enumerate(model)
        for name, p in stage.named_parameters()
        if p.requires_grad
    }


def of_all_ranks(place, tensors: dict[tuple, torch.Tensor]) -> dict[tuple, torch.Tensor]:
    gathered = [None] * place.world_size
    torch.distributed.all_gather_object(gathered, tensors)
    return {key: tensor for of_rank in gathered for key, tensor in of_rank.items()}


def reduced_gradients(model) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return the whole gradients of this rank's parameters.

    Each data-parallel rank has a shard of them.
    """
    gradients = {}
    for buffer in (buffer for stage in model for buffer in stage.buffers):
        [bucket], group = buffer.buckets, buffer.data_parallel_group
        whole = torch.empty_like(bucket.grad_data)
        torch.distributed.all_gather_into_tensor(
            whole, bucket.grad_data.chunk(group.size())[group.rank()], group=group
        )
        gradients |= {
            p: whole[start:end].view(p.shape)
            for p, (start, end, _bucket) in buffer.param_index_map.items()
        }
    return gradients


def trajectory(config, place, model) -> None:
    """Check every weight after every step against a plain optimizer in one process.

    From the same gradients both make the same change, to 1e-6 of it.
    """
    from retemper.pipeline.data.reader import TrainingBatches
    from retemper.pipeline.model.forward import run_schedule
    from retemper.pipeline.train.optimizer import build_optimizer, build_schedule
    from retemper.pipeline.train.step import norm_of_gradients, step_by_gradients

    settings, optimizer = config.optimizer, build_optimizer(config, model)
    schedule = build_schedule(config, optimizer)
    trained = trained_parameters(place, model)
    initial = of_all_ranks(place, {key: p.detach().float().clone() for key, p in trained.items()})
    plain = Plain(config, initial)
    with TrainingBatches(config, place, 0, config.steps) as batches:
        for step, data in enumerate(batches):
            for stage in model:
                stage.zero_grad_buffer()
            optimizer.zero_grad()
            run_schedule(model, data.micro_batches, forward_only=False)
            reduced = reduced_gradients(model)
            gradients = of_all_ranks(place, {key: reduced[p] for key, p in trained.items()})
            norm = (
                torch.cat([gradient.flatten().double() for gradient in gradients.values()])
                .norm()
                .item()
            )
            grad_norm = norm_of_gradients(optimizer)
            step_by_gradients(config, optimizer, grad_norm)
            found = norms_of_step(model, optimizer)
            schedule.step(config.tokens_per_step)
            assert grad_norm == pytest.approx(norm, rel=1e-6), "gradient norm"
            assert norm > settings.clip_grad
            # By the norm in megatron-core's rounding: the sign of what is next to zero is that of a
            # rounding error.
            clip = settings.clip_grad / (grad_norm + 1e-6)
            lr = settings.lr * min(
                1.0, step * config.tokens_per_step / config.schedule.warmup_tokens
            )
            before = {key: weight.clone() for key, weight in plain.weights.items()}
            plain.step({key: clip * gradients[key] for key in initial}, lr)
            assert found == pytest.approx(plain.norms_since(before), rel=1e-4), step
            for key, p in trained.items():
                way = (plain.weights[key] - initial[key]).norm()
                assert (way > 0) == (step > 0), (step, key)  # the first step's rate is zero
                held = (
                    torch.finfo(p.dtype).eps / 2 * plain.weights[key].norm()
                )  # what the weight's type can say
                assert (p.detach().float() - plain.weights[key]).norm() <= 1e-6 * way + held, (
                    step,
                    key,
                )


def norms_of_each_rank(config, place, model) -> None:
    """Check that the trajectory detects the fault of megatron-core's own Lion.

    Its gradient norms are not summed over data-parallel ranks.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    alone = mock.patch.object(
        DistributedOptimizer, "get_grad_stats_parallel_group", lambda self: self.tp_group
    )
    with alone, pytest.raises(AssertionError, match="gradient norm"):
        trajectory(config, place, model)
