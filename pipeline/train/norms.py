"""Norms of the weights of each kind and of their last update.

They are computed from the optimizer's float32 shards, without a copy of the shards.
"""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from retemper.pipeline.distributed.collectives import all_reduce_sum

KINDS = ("embedding", "attention", "mlp", "norm", "head", "lora_A", "lora_B", "lora_magnitude")


def kind_of(name: str) -> str:
    """Return which of KINDS a parameter is, by its name."""
    leaf = name.rpartition(".")[2]
    if leaf in KINDS:
        return leaf
    if "norm" in name:
        return "norm"
    return next(kind for part, kind in _PARTS.items() if part in name)


_PARTS = {
    "self_attention": "attention",
    "mlp": "mlp",
    "embedding": "embedding",
    "output_layer": "head",
}


@torch.no_grad()
def norms_of_step(model, optimizer: MegatronOptimizer) -> dict[str, float]:
    """Return parameter_norm/KIND and update_norm/KIND (L2) of the trainable parameters.

    Call it after the optimizer's step and before the learning rate changes. The result is the same
    on every rank.

    Collective: every rank must call this.
    """
    names = {parameter: name for stage in model for name, parameter in stage.named_parameters()}
    squares: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for part in optimizer.chained_optimizers:
        for parameter, shard, group in _shards(part):
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                update = _update(part.optimizer.state[shard], shard, group)
                lengths = [
                    torch.linalg.vector_norm(tensor, dtype=torch.float64)
                    for tensor in (shard, update)
                ]
                squares[kind_of(names[parameter])].append(
                    torch.stack([*lengths, lengths[0].new_ones(())]).square()
                )
    local_sums = torch.cat(
        [
            torch.stack(triples).sum(0).cpu() if triples else torch.zeros(3)
            for triples in squares.values()
        ]
    )
    # Per kind: sums of squares of the weights and of the update, and the number of shards.
    sums = torch.tensor(all_reduce_sum(local_sums.tolist())).view(-1, 3)
    present = {kind: values for kind, values in zip(KINDS, sums.tolist(), strict=True) if values[2]}
    return {
        f"{quantity}_norm/{kind}": values[index] ** 0.5
        for index, quantity in enumerate(("parameter", "update"))
        for kind, values in present.items()
    }


def _shards(part) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, dict]]:
    """Yield each parameter of a distributed optimizer that has a shard on this rank.

    Yields (parameter, its float32 shard, its parameter group).
    """
    models = zip(part.model_fp32_groups, part.model_float16_groups, strict=True)
    shards = zip(part.shard_fp32_groups, part.shard_fp32_from_float16_groups, strict=True)
    groups = zip(part.optimizer.param_groups, models, shards, strict=True)
    for group, group_parameters, group_shards in groups:
        for parameter, shard in zip(sum(group_parameters, []), sum(group_shards, []), strict=True):
            yield parameter, shard, group


def _update(state: dict[str, torch.Tensor], shard: torch.Tensor, group: dict) -> torch.Tensor:
    """Return what the last step subtracted from a shard.

    It is reconstructed from the optimizer's state, and for Lion also from the gradient.
    """
    beta1, beta2 = group["betas"]
    if "exp_avg_sq" in state:  # AdamW
        step = float(group["step"] if "step" in group else state["step"])
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = state["exp_avg"] / (1 - beta1**step) / root
        decay = group["lr"] * group["weight_decay"]
    else:  # lion.py
        momentum_before = (state["exp_avg"] - (1 - beta2) * shard.grad) / beta2
        direction = momentum_before.lerp(shard.grad, 1 - beta1).sign_()
        decay = group["lr"] / group["max_lr"] * group["weight_decay"]
    return (group["lr"] * direction + decay * shard) / (1 - decay)
