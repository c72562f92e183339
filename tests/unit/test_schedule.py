"""Test that the learning rate equals its closed form in the number of consumed tokens."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import overrides

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.config.schedules import (
    ending,
    ends_in_warmup,
    largest_warmup,
    last_share,
    share_of_peak,
)
from retemper.pipeline.distributed.topology import prepare_megatron
from retemper.pipeline.errors import UserError

SCHEDULES = {
    "trapezoid": ["schedule.warmup_tokens=100M"],
    # Only a branch may have a warm-up that ends within the cooldown, or that the run ends in.
    "trapezoid-overlapping": [
        "branch_of=unread",
        "schedule.warmup_tokens=1.8B",
        "schedule.min_lr_ratio=0.1",
    ],
    "trapezoid-unfinished": ["branch_of=unread", "schedule.warmup_tokens=4B"],
    "trapezoid-constant": ["schedule.cooldown_fraction=0"],
    "cosine": ["schedule.warmup_tokens=200M"],
    "inverse_sqrt": ["schedule.warmup_tokens=100M", "schedule.min_lr_ratio=0.25"],
}
RATIO = 16  # of the learning rate of LoRA+'s group to that of the other


def closed_form(config, tokens: int) -> float:
    """Return the share of the peak rate, computed with exact fractions."""
    settings = config.schedule
    total = config.steps * config.tokens_per_step
    if tokens <= settings.warmup_tokens and settings.warmup_tokens:
        return tokens / settings.warmup_tokens
    floor = Fraction(settings.min_lr_ratio)
    if settings.name == "trapezoid":
        cooldown = Fraction(settings.cooldown_fraction) * total
        return float(floor + (1 - floor) * (min(1, (total - tokens) / cooldown) if cooldown else 1))
    if settings.name == "inverse_sqrt":
        return max(float(floor), math.sqrt(Fraction(settings.warmup_tokens, tokens)))
    done = Fraction(tokens - settings.warmup_tokens, total - settings.warmup_tokens)
    return float(floor) + (1 - float(floor)) * (1 + math.cos(math.pi * done)) / 2


@pytest.fixture(scope="module", params=SCHEDULES)
def config(request):
    changes = [
        "train.tokens=2B",
        "train.global_batch_size=192",
        "data.seq_length=4096",
        "model.max_sequence_length=4096",
    ]
    preset = f"schedule={request.param.partition('-')[0]}"
    return load_config(
        overrides(
            Path("unread"),
            request.param,
            *changes,
            preset,
            "schedule.warmup_tokens=0",
            *SCHEDULES[request.param],
        )
    )


def schedule_of(config):
    """Return a schedule over a real optimizer with a plain parameter group and one of LoRA+."""
    prepare_megatron()
    import torch

    from retemper.pipeline.train.optimizer import build_schedule

    floor = config.optimizer.lr * config.schedule.min_lr_ratio
    groups = [
        {"params": [torch.zeros(1)]},
        {
            "params": [torch.zeros(1)],
            "max_lr": config.optimizer.lr * RATIO,
            "min_lr": floor * RATIO,
        },
    ]
    return build_schedule(config, torch.optim.SGD(groups))


def rates(schedule) -> list[float]:
    return [group["lr"] for group in schedule.optimizer.param_groups]


def test_learning_rate_of_every_step_equals_the_closed_form(config):
    schedule = schedule_of(config)
    peak = config.optimizer.lr
    for step in range(config.steps):
        assert schedule.num_steps == step * config.tokens_per_step
        expected = peak * closed_form(config, schedule.num_steps)
        plain, plus = rates(schedule)
        assert [plain, plus / RATIO] == pytest.approx([expected, expected], rel=0, abs=1e-15 * peak)
        schedule.step(config.tokens_per_step)


def test_share_of_peak_equals_that_of_the_schedule(config):
    schedule = schedule_of(config)
    for _step in range(config.steps):
        plain, _plus = rates(schedule)
        assert share_of_peak(config, schedule.num_steps) == pytest.approx(
            plain / config.optimizer.lr, rel=1e-9, abs=1e-12
        )
        schedule.step(config.tokens_per_step)
    assert last_share(config) == pytest.approx(plain / config.optimizer.lr, rel=1e-9, abs=1e-12)


def test_resuming_with_another_batch_size_does_not_change_the_rate(config):
    uninterrupted = schedule_of(config)
    expected = []
    for _step in range(config.steps):
        expected.append(rates(uninterrupted))
        uninterrupted.step(config.tokens_per_step)
    half = config.steps // 2
    resumed = schedule_of(config)
    resumed.step(half * config.tokens_per_step)
    for step in range(half, config.steps):
        assert rates(resumed) == expected[step]
        for _third in range(3):  # from here on, batches of a third of the size
            resumed.step(config.tokens_per_step // 3)


STEP = 8 * 64  # tokens of the tests' smallest run, which has ten steps


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ([], 8 * STEP),
        (["schedule.cooldown_fraction=0.5"], 5 * STEP),
        (["schedule.cooldown_fraction=0.3"], 7 * STEP),
        (["schedule.cooldown_fraction=1"], 0),
        (["schedule.cooldown_fraction=0.333"], math.floor(10 * STEP * 0.667)),
        ([f"train.tokens={11 * STEP - 1}"], 8 * STEP),  # ten whole steps
        ([f"train.tokens={7 * STEP}"], math.floor(0.8 * 7 * STEP)),
    ],
)
def test_warmup_that_reaches_into_the_cooldown_is_refused_and_the_named_one_fits(changes, largest):
    def config_with(warmup: int):
        return load_config(
            overrides(Path("unread"), "x", *changes, f"schedule.warmup_tokens={warmup}")
        )

    fits = config_with(largest)
    assert largest_warmup(fits) == largest
    for warmup in (largest + 1, 10**9):
        with pytest.raises(UserError) as refusal:
            config_with(warmup)
        message = str(refusal.value)
        assert f"schedule.warmup_tokens={warmup} " in message
        assert "has 1 problem" in message
        assert f"={largest} or less" in message or f"set it to {largest} or less" in message
    # The rate never drops by a jump.
    shares = [
        share_of_peak(fits, tokens)
        for tokens in range(0, 10 * STEP, 16)
        if tokens < fits.steps * STEP
    ]
    assert max(before - after for before, after in zip(shares, shares[1:])) < 0.05


@pytest.mark.parametrize(
    "changes", [["schedule=cosine"], ["schedule.cooldown_fraction=0"], ["train.branches=[5120]"]]
)
def test_warmup_may_take_the_whole_run_without_a_cooldown(changes):
    """Check also a trunk, which has no cooldown, because its branches cool down."""
    keys = overrides(Path("unread"), "x", *changes)
    assert load_config([*keys, f"schedule.warmup_tokens={10 * STEP - 1}"])
    with pytest.raises(
        UserError,
        match=f"not less than the run's {10 * STEP} tokens: set it to {10 * STEP - 1} or less",
    ):
        load_config([*keys, f"schedule.warmup_tokens={10 * STEP}"])


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        (18 * STEP, "ends within its warm-up at 50% of the peak rate"),
        (9 * STEP, "ends within its warm-up at 100% of the peak rate"),
        (
            9 * STEP - 1,
            "warms up into its cooldown: after 4,607 tokens the rate falls from 100% to 50% "
            "at once; its last step is at 50% of",
        ),
        (8 * STEP, "cools down; its last step is at 50% of the peak rate"),
        (0, "cools down; its last step is at 50% of the peak rate"),
    ],
)
def test_ending_of_a_branch_is_described(warmup, message):
    branch = load_config(
        overrides(Path("unread"), "x", "branch_of=unread", f"schedule.warmup_tokens={warmup}")
    )
    assert ending(branch).startswith(message)
    assert ends_in_warmup(branch) == ("within its warm-up" in message)


def test_existing_run_keeps_a_warmup_that_a_new_run_is_refused(tmp_path):
    keys = overrides(tmp_path, "old", f"schedule.warmup_tokens={9 * STEP}")
    with pytest.raises(UserError, match="reaches into the cooldown"):
        load_config(keys)
    valid = load_config(overrides(tmp_path, "old"))
    started = valid.model_copy(
        update={"schedule": valid.schedule.model_copy(update={"warmup_tokens": 9 * STEP})}
    )
    started.run_dir.mkdir(parents=True)
    (started.run_dir / "config.json").write_text(started.to_json())
    assert load_config(keys) == load_run(started.run_dir, []) == started
