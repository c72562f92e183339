"""The learning rate in closed form, as a share of its peak. Arithmetic alone."""

import math

from retemper.pipeline.schema.run import Config


def length_of(config: Config) -> int:
    """Tokens of a run, in whole steps."""
    return config.steps * config.tokens_per_step


def largest_warmup(config: Config) -> int:
    """Tokens that a run's warm-up may take: up to where the cooldown begins, or the run ends."""
    length = length_of(config)
    if not config.cooldown_fraction:
        return length - 1
    # In this order, as megatron-core reckons it: what is named here is accepted.
    return math.floor(length - config.cooldown_fraction * length)


def share_of_peak(config: Config, tokens: int) -> float:
    """The rate of the step that begins at a number of consumed tokens, from 0 to 1.

    Warm-up takes precedence over cooldown.
    """
    settings = config.schedule
    length = length_of(config)
    warmup = settings.warmup_tokens
    least = settings.min_lr_ratio
    if warmup and tokens <= warmup:
        return tokens / warmup
    if settings.name == "inverse_sqrt":
        return max(least, math.sqrt(warmup / tokens))
    if settings.name == "cosine":
        done = (tokens - warmup) / (length - warmup)
        return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2
    cooldown = config.cooldown_fraction * length
    remaining = min(1.0, (length - tokens) / cooldown) if cooldown else 1.0
    return least + (1 - least) * remaining


def last_share(config: Config) -> float:
    """The rate of the run's last step, as a share of the peak."""
    return share_of_peak(config, length_of(config) - config.tokens_per_step)


def ends_in_warmup(config: Config) -> bool:
    """Whether a branch's last step is still of its warm-up, so that it was never cooled down."""
    last = length_of(config) - config.tokens_per_step
    return config.branch_of is not None and 0 < config.schedule.warmup_tokens >= last


def ending(config: Config) -> str:
    """How a branch ends, for its first lines, its plan and a table."""
    last = percent(last_share(config))
    if ends_in_warmup(config):
        return f"ends within its warm-up at {last} of the peak rate"
    warmup = config.schedule.warmup_tokens
    if warmup <= largest_warmup(config):
        return f"cools down; its last step is at {last} of the peak rate"
    after = percent(share_of_peak(config, warmup + 1))
    return (
        f"warms up into its cooldown: after {warmup:,} tokens the rate falls from 100% to {after} "
        f"at once; its last step is at {last} of the peak rate"
    )


def percent(share: float) -> str:
    """A share, to three digits."""
    return f"{100 * share:.3g}%"
