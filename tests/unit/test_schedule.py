"""The learning rate is the closed form of consumed tokens."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import overrides

from retemper.pipeline.config import load_config
from retemper.pipeline.distributed.topology import prepare_megatron

SCHEDULES = {
    "trapezoid": ["schedule.warmup_tokens=100M"],
    "trapezoid-overlapping": ["schedule.warmup_tokens=1.8B", "schedule.min_lr_ratio=0.1"],  # warm-up ends within the cooldown
    "trapezoid-constant": ["schedule.cooldown_fraction=0"],
    "cosine": ["schedule.warmup_tokens=200M"],
    "inverse_sqrt": ["schedule.warmup_tokens=100M", "schedule.min_lr_ratio=0.25"],
}
RATIO = 16  # of a LoRA+ group's rate


def closed_form(config, tokens: int) -> float:
    """Of the peak, with exact fractions."""
    settings, total = config.schedule, config.steps * config.tokens_per_step
    if tokens <= settings.warmup_tokens and settings.warmup_tokens:
        return tokens / settings.warmup_tokens
    least = Fraction(settings.min_lr_ratio)
    if settings.name == "trapezoid":
        cooldown = Fraction(settings.cooldown_fraction) * total
        return float(least + (1 - least) * (min(1, (total - tokens) / cooldown) if cooldown else 1))
    if settings.name == "inverse_sqrt":
        return max(float(least), math.sqrt(Fraction(settings.warmup_tokens, tokens)))
    done = Fraction(tokens - settings.warmup_tokens, total - settings.warmup_tokens)
    return float(least) + (1 - float(least)) * (1 + math.cos(math.pi * done)) / 2


@pytest.fixture(scope="module", params=SCHEDULES)
def config(request):
    changes = ["train.tokens=2B", "train.global_batch_size=192", "data.seq_length=4096", "model.max_sequence_length=4096"]
    preset = f"schedule={request.param.partition('-')[0]}"
    return load_config(overrides(Path("unread"), request.param, *changes, preset, "schedule.warmup_tokens=0", *SCHEDULES[request.param]))


def schedule_of(config):
    """A schedule over a real optimizer with a plain group and LoRA+'s."""
    prepare_megatron()
    import torch

    from retemper.pipeline.train.optimizer import build_schedule

    least = config.optimizer.lr * config.schedule.min_lr_ratio
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "max_lr": config.optimizer.lr * RATIO, "min_lr": least * RATIO}]
    return build_schedule(config, torch.optim.SGD(groups))


def rates(schedule) -> list[float]:
    return [group["lr"] for group in schedule.optimizer.param_groups]


def test_every_step_has_the_closed_form(config):
    schedule, peak = schedule_of(config), config.optimizer.lr
    for step in range(config.steps):
        assert schedule.num_steps == step * config.tokens_per_step
        expected = peak * closed_form(config, schedule.num_steps)
        plain, plus = rates(schedule)
        assert [plain, plus / RATIO] == pytest.approx([expected, expected], rel=0, abs=1e-15 * peak)
        schedule.step(config.tokens_per_step)


def test_a_resume_and_another_batch_size_change_no_rate(config):
    straight, expected = schedule_of(config), []
    for _step in range(config.steps):
        expected.append(rates(straight))
        straight.step(config.tokens_per_step)
    half = config.steps // 2
    resumed = schedule_of(config)
    resumed.step(half * config.tokens_per_step)
    for step in range(half, config.steps):
        assert rates(resumed) == expected[step]
        for _third in range(3):  # from here on batches of a third
            resumed.step(config.tokens_per_step // 3)
