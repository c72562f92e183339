"""How large the weights of each kind are, and how far a step moved them: from the optimizer's float32 shards, without a copy of them."""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from retemper.pipeline.distributed.collectives import sum_over_ranks

KINDS = ("embedding", "attention", "mlp", "norm", "head", "lora_A", "lora_B", "lora_magnitude")


def kind_of(name: str) -> str:
    """Of a parameter, by its name."""
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
    """parameter_norm/KIND and update_norm/KIND (L2) of what trains, after the optimizer's step and before its rate moves on.

    Every rank calls it, and gets the same.
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
    sums = torch.cat(
        [
            torch.stack(of_kind).sum(0).cpu() if of_kind else torch.zeros(3)
            for of_kind in squares.values()
        ]
    )
    summed = torch.tensor(sum_over_ranks(sums.tolist())).view(-1, 3)
    found = {kind: values for kind, values in zip(KINDS, summed.tolist(), strict=True) if values[2]}
    return {
        f"{what}_norm/{kind}": values[place] ** 0.5
        for place, what in enumerate(("parameter", "update"))
        for kind, values in found.items()
    }


def _shards(part) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, dict]]:
    """Each parameter of which this rank's distributed optimizer steps a part, that part in float32, and its options."""
    models = zip(part.model_fp32_groups, part.model_float16_groups, strict=True)
    shards = zip(part.shard_fp32_groups, part.shard_fp32_from_float16_groups, strict=True)
    for group, of_model, of_shard in zip(part.optimizer.param_groups, models, shards, strict=True):
        for parameter, shard in zip(sum(of_model, []), sum(of_shard, []), strict=True):
            yield parameter, shard, group


def _update(state: dict[str, torch.Tensor], shard: torch.Tensor, group: dict) -> torch.Tensor:
    """What the step before took off a shard, from what it left behind: the optimizer's state, and of Lion the gradient."""
    beta1, beta2 = group["betas"]
    if "exp_avg_sq" in state:  # AdamW
        step = float(group.get("step", state.get("step")))
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = state["exp_avg"] / (1 - beta1**step) / root
        decay = group["lr"] * group["weight_decay"]
    else:  # lion.py
        before = (state["exp_avg"] - (1 - beta2) * shard.grad) / beta2
        direction = before.lerp(shard.grad, 1 - beta1).sign_()
        decay = group["lr"] / group["max_lr"] * group["weight_decay"]
    return (group["lr"] * direction + decay * shard) / (1 - decay)
