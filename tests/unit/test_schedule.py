"""Test that the learning rate is the closed form of consumed tokens."""

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
    # Of branches alone: a warm-up that ends within the cooldown, and one that the run ends in.
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
RATIO = 16  # of a LoRA+ group's rate


def closed_form(config, tokens: int) -> float:
    """Return the fraction of the peak rate, with exact fractions."""
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
    """Return a schedule over a real optimizer with a plain group and LoRA+'s."""
    prepare_megatron()
    import torch

    from retemper.pipeline.train.optimizer import build_schedule

    least = config.optimizer.lr * config.schedule.min_lr_ratio
    groups = [
        {"params": [torch.zeros(1)]},
        {
            "params": [torch.zeros(1)],
            "max_lr": config.optimizer.lr * RATIO,
            "min_lr": least * RATIO,
        },
    ]
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


def test_the_share_of_the_peak_is_that_of_the_schedule(config):
    schedule = schedule_of(config)
    for _step in range(config.steps):
        plain, _plus = rates(schedule)
        assert share_of_peak(config, schedule.num_steps) == pytest.approx(
            plain / config.optimizer.lr, rel=1e-9, abs=1e-12
        )
        schedule.step(config.tokens_per_step)
    assert last_share(config) == pytest.approx(plain / config.optimizer.lr, rel=1e-9, abs=1e-12)


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
def test_a_warmup_that_reaches_into_the_cooldown_is_refused_and_what_is_named_fits(
    changes, largest
):
    def config_with(warmup: int):
        return load_config(
            overrides(Path("unread"), "x", *changes, f"schedule.warmup_tokens={warmup}")
        )

    fits = config_with(largest)
    assert largest_warmup(fits) == largest
    for warmup in (largest + 1, 10**9):
        with pytest.raises(UserError) as refusal:
            config_with(warmup)
        assert f"schedule.warmup_tokens={warmup} " in str(refusal.value) and "has 1 problem" in str(
            refusal.value
        )
        assert f"={largest} or less" in str(refusal.value) or f"set it to {largest} or less" in str(
            refusal.value
        )
    # The rate never falls at once.
    shares = [
        share_of_peak(fits, tokens)
        for tokens in range(0, 10 * STEP, 16)
        if tokens < fits.steps * STEP
    ]
    assert max(before - after for before, after in zip(shares, shares[1:])) < 0.05


@pytest.mark.parametrize(
    "changes", [["schedule=cosine"], ["schedule.cooldown_fraction=0"], ["train.branches=[5120]"]]
)
def test_without_a_cooldown_a_warmup_may_take_the_whole_run(changes):
    """Check a trunk, which has no cooldown: its branches cool down."""
    asked = overrides(Path("unread"), "x", *changes)
    assert load_config([*asked, f"schedule.warmup_tokens={10 * STEP - 1}"])
    with pytest.raises(
        UserError,
        match=f"not less than the run's {10 * STEP} tokens: set it to {10 * STEP - 1} or less",
    ):
        load_config([*asked, f"schedule.warmup_tokens={10 * STEP}"])


@pytest.mark.parametrize(
    ("warmup", "said"),
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
def test_a_branch_says_how_it_ends(warmup, said):
    branch = load_config(
        overrides(Path("unread"), "x", "branch_of=unread", f"schedule.warmup_tokens={warmup}")
    )
    assert ending(branch).startswith(said)
    assert ends_in_warmup(branch) == ("within its warm-up" in said)


def test_a_run_that_has_begun_keeps_the_warmup_that_a_new_one_must_not_have(tmp_path):
    asked = overrides(tmp_path, "old", f"schedule.warmup_tokens={9 * STEP}")
    with pytest.raises(UserError, match="reaches into the cooldown"):
        load_config(asked)
    fine = load_config(overrides(tmp_path, "old"))
    begun = fine.model_copy(
        update={"schedule": fine.schedule.model_copy(update={"warmup_tokens": 9 * STEP})}
    )
    begun.run_dir.mkdir(parents=True)
    (begun.run_dir / "config.json").write_text(begun.to_json())
    assert load_config(asked) == load_run(begun.run_dir, []) == begun
