"""The learning rate in closed form, as a fraction of its peak, without torch."""

import math

from retemper.pipeline.schema.run import Config


def length_of(config: Config) -> int:
    """Return the length of a run in tokens, in whole steps."""
    return config.steps * config.tokens_per_step


def largest_warmup(config: Config) -> int:
    """Return the most tokens that a warm-up may take: up to the cooldown, or the run's end."""
    length = length_of(config)
    if not config.cooldown_fraction:
        return length - 1
    # In the order of megatron-core's arithmetic, so that it accepts the value returned here.
    return math.floor(length - config.cooldown_fraction * length)


def share_of_peak(config: Config, tokens: int) -> float:
    """Return the learning rate of the step that begins at `tokens` consumed tokens.

    It is a fraction of the peak, from 0 to 1. Warm-up takes precedence over cooldown.
    """
    settings = config.schedule
    length = length_of(config)
    warmup = settings.warmup_tokens
    minimum = settings.min_lr_ratio
    if warmup and tokens <= warmup:
        return tokens / warmup
    if settings.name == "inverse_sqrt":
        return max(minimum, math.sqrt(warmup / tokens))
    if settings.name == "cosine":
        progress = (tokens - warmup) / (length - warmup)
        return minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2
    cooldown = config.cooldown_fraction * length
    remaining = min(1.0, (length - tokens) / cooldown) if cooldown else 1.0
    return minimum + (1 - minimum) * remaining


def last_share(config: Config) -> float:
    """Return the learning rate of the run's last step, as a fraction of the peak."""
    return share_of_peak(config, length_of(config) - config.tokens_per_step)


def ends_in_warmup(config: Config) -> bool:
    """Return whether a branch ends within its warm-up, so that it is never cooled down."""
    last = length_of(config) - config.tokens_per_step
    return config.branch_of is not None and 0 < config.schedule.warmup_tokens >= last


def ending(config: Config) -> str:
    """Describe how a branch ends, for its first log lines, its plan and a table."""
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
    """Format a fraction as a percentage with three significant digits."""
    return f"{100 * share:.3g}%"
