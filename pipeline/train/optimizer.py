"""Build megatron-core's distributed optimizer and learning-rate schedule from the config.

The schedule counts tokens.
"""

from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from retemper.pipeline.schema.run import Config
from retemper.pipeline.train.lion import Lion


def build_optimizer(config: Config, model) -> MegatronOptimizer:
    """Build AdamW or Lion over the trainable parameters of a model's stages.

    The optimizer states are sharded over the data-parallel ranks.
    """
    settings = config.optimizer
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.lr * config.schedule.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.precision != "fp32",
        fp8_recipe=config.fp8_recipe,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
    )
    overrides = get_standard_config_overrides(megatron)
    if config.method.lora and config.method.lora.lr_ratio > 1:  # LoRA+ (arXiv 2402.12354)
        ratio = config.method.lora.lr_ratio
        overrides[ParamKey(name="*.lora_B")] = {
            "max_lr": megatron.lr * ratio,
            "min_lr": megatron.min_lr * ratio,
        }
    optimizer = get_megatron_optimizer(megatron, list(model), overrides)
    if settings.name == "lion":
        _replace_adam_with_lion(optimizer)
    if config.branch_of:
        _keep_own_rates(optimizer)
    return optimizer


def _keep_own_rates(optimizer: MegatronOptimizer) -> None:
    """Let a branch load its trunk's optimizer state without its learning rates. Works in place.

    megatron-core 0.19 matches the saved parameter group to a parameter by the group's learning
    rates, among other keys, and overwrites the rates with the saved ones.
    """
    load = optimizer.load_state_dict

    def load_at_own_rates(state: dict) -> None:
        own = {group["max_lr"]: group["min_lr"] for group in optimizer.param_groups}
        saved = state["optimizer"]["param_groups"]
        # One peak, or with LoRA+ two: that of A, and the higher one of B.
        peaks = dict(zip(sorted({group["max_lr"] for group in saved}), sorted(own), strict=True))
        for group in saved:
            peak = peaks[group["max_lr"]]
            group["max_lr"] = peak
            group["min_lr"] = own[peak]
        load(state)

    optimizer.load_state_dict = load_at_own_rates


def _replace_adam_with_lion(optimizer: MegatronOptimizer) -> None:
    """Replace Adam with Lion in a distributed optimizer, in place and before the first step.

    When configured for Lion, megatron-core 0.19 does not use the distributed optimizer: each
    data-parallel rank then steps with gradients of which only its own shard is reduced, without any
    warning. The distributed optimizer itself handles Lion's state, by the name in its config.
    """
    for part in optimizer.chained_optimizers:
        lion = Lion([{"params": []}], defaults={})
        # Assigned as the distributed optimizer does for Adam: torch's constructor refuses views.
        lion.param_groups = part.optimizer.param_groups
        part.optimizer = lion
        part.config.optimizer = "lion"


def build_schedule(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the learning-rate schedule over consumed tokens.

    `step(tokens)` of the schedule advances it. An optimizer step uses the rate at its start.
    """
    settings = config.schedule
    total_tokens = config.steps * config.tokens_per_step
    peak, decay = config.optimizer.lr, config.optimizer.weight_decay
    trapezoid = "WSD" if config.cooldown_fraction else "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * settings.min_lr_ratio,
        lr_warmup_steps=settings.warmup_tokens,
        lr_decay_steps=max(total_tokens, settings.warmup_tokens + 1),  # a branch may end within it
        lr_decay_style={
            "trapezoid": trapezoid,
            "cosine": "cosine",
            "inverse_sqrt": "inverse-square-root",
        }[settings.name],
        wsd_decay_steps=config.cooldown_fraction * total_tokens,
        lr_wsd_decay_style="linear",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
