"""Test scores, standard errors and intervals against exact arithmetic and published tables."""

import math
import random
from fractions import Fraction
from statistics import fmean, stdev

import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.uncertainty import (
    Estimate,
    estimate,
    mean,
    paired_difference,
    pass_at_k,
    ratio,
    student,
)


def test_pass_at_k_equals_exact_combinatorics():
    for n in (*range(1, 13), 50, 200):
        for k in {1, min(2, n), max(1, n // 2), n}:
            for c in range(n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert math.isclose(pass_at_k(n, c, k), exact, rel_tol=1e-12, abs_tol=1e-15)


def test_pass_at_k_is_the_probability_that_one_of_k_samples_passes():
    from itertools import combinations

    outcomes = [True, True, False, False, False, False]
    draws = list(combinations(outcomes, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-15)
    assert pass_at_k(50, 7, 1) == pytest.approx(7 / 50, rel=1e-15)


@pytest.mark.parametrize("n, c, k", [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(UserError, match="k must be from 1 to the number of samples"):
        pass_at_k(n, c, k)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", Statistics in
# Medicine 17, table I, method 3 (Wilson's score).
@pytest.mark.parametrize(
    "passed, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_of_binary_scores_is_wilsons(passed, n, low, high):
    found = estimate([1.0] * passed + [0.0] * (n - passed))
    assert (round(found.low, 4), round(found.high, 4), found.problems) == (low, high, n)
    assert found.value == passed / n
    assert found.stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / (n - 1)))


def test_unit_of_observation_is_the_problem_and_not_the_sample():
    """Check that four problems with 50 equal samples each count as four, not as two hundred."""
    whole = estimate([pass_at_k(50, c, 1) for c in (50, 50, 0, 0)])
    assert whole == estimate([1, 1, 0, 0])
    # Four deviations of a half: their squares sum to 1, over (4 - 1) and over 4.
    assert whole.stderr == pytest.approx(math.sqrt(1 / 12))
    mixed = estimate([0.2, 0.4, 0.6, 0.8])
    assert mixed.value == pytest.approx(0.5)
    assert mixed.stderr == pytest.approx(math.sqrt(0.2 / 3 / 4))
    assert mixed.low > whole.low
    assert mixed.high < whole.high
    # Wilson's interval with p(1 - p) / (squares / n²) = 0.25 / (0.2 / 16) = 20 problems:
    # 0.5 ± 1.96 √(0.25/20 + 1.96²/1600) / (1 + 1.96²/20)
    assert (round(mixed.low, 3), round(mixed.high, 3)) == (0.299, 0.701)


@pytest.mark.parametrize("score", [0.0, 1.0, 0.5])
def test_equal_scores_have_an_interval_within_bounds(score):
    found = estimate([score] * 164)
    assert found.stderr == 0
    assert 0 <= found.low <= score <= found.high <= 1
    assert found.high - found.low > 0.02


def test_interval_has_its_nominal_coverage():
    chance = random.Random(1)
    drawn = 1000
    for samples in (1, 10):
        covered = 0
        for _ in range(drawn):
            # The difficulties vary widely. The mean of U² is a third, for a uniform U.
            scores = [
                pass_at_k(samples, sum(chance.random() < d for _ in range(samples)), 1)
                for d in (chance.random() ** 2 for _ in range(100))
            ]
            found = estimate(scores)
            covered += found.low <= 1 / 3 <= found.high
        assert 0.93 < covered / drawn < 0.97


def test_one_problem_has_no_standard_error():
    assert math.isnan(estimate([1.0]).stderr)
    with pytest.raises(UserError, match="no problem"):
        estimate([])


def test_checkpoints_are_compared_problem_by_problem():
    # The differences are 0.2, 0.1, 0.3, 0.2: the mean is 0.2, the sum of squared deviations 0.02,
    # the standard error √(0.02 / 3 / 4) = 0.0408, and 1.96 times that 0.0800.
    before = {"a": 0.1, "b": 0.5, "c": 0.6, "d": 0.0}
    after = {"d": 0.2, "c": 0.9, "b": 0.6, "a": 0.3}
    found = paired_difference(before, after)
    assert (round(found.value, 4), round(found.stderr, 4), found.problems) == (0.2, 0.0408, 4)
    assert (round(found.low, 4), round(found.high, 4)) == (0.12, 0.28)
    back = paired_difference(after, before)
    assert (round(back.low, 4), round(back.high, 4)) == (-0.28, -0.12)


def test_pairing_subtracts_the_covariance():
    """Check equation 7 of Miller 2024.

    The variance of the difference is the sum of the two variances less twice their covariance.
    """
    chance = random.Random(2)
    before = {n: chance.random() for n in range(300)}
    after = {n: min(1.0, score + 0.1 * chance.random()) for n, score in before.items()}
    x, y = list(before.values()), list(after.values())
    covariance = sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y)) / (len(x) - 1)
    expected = math.sqrt((stdev(x) ** 2 + stdev(y) ** 2 - 2 * covariance) / len(x))
    found = paired_difference(before, after)
    assert found.stderr == pytest.approx(expected, rel=1e-9)
    assert found.stderr < math.hypot(estimate(x).stderr, estimate(y).stderr) / 5


def test_checkpoints_scored_on_different_problems_are_refused():
    with pytest.raises(
        UserError, match="same problems.*2 problems are in only one of them, such as b"
    ):
        paired_difference({"a": 1, "b": 0}, {"a": 1, "c": 0})


def test_ratio_equals_the_mean_if_all_samples_have_one_size():
    bits = [2.0, 3.0, 7.0, 4.0]
    found = ratio(bits, [4.0] * 4)
    assert (found.value, found.problems) == (1.0, 4)
    assert found.stderr == pytest.approx(stdev(bits) / math.sqrt(4) / 4)
    # With sizes 1 and 3 the ratio is 6/4 and the residuals are 3 - 1.5 and 3 - 4.5. So the standard
    # error is √(2/1 · (1.5² + 1.5²)) / 4.
    assert ratio([3.0, 3.0], [1.0, 3.0]).stderr == pytest.approx(0.75)


def test_interval_of_a_ratio_has_its_nominal_coverage():
    """Check samples of unequal length whose bits grow with their length.

    The interval of the difference of two checkpoints is checked, too.
    """
    chance = random.Random(3)
    drawn = 1000
    covered = 0
    covered_pairs = 0
    for _ in range(drawn):
        sizes = [chance.uniform(50, 400) for _ in range(100)]
        hard = [chance.gauss(2.0, 0.5) for _ in sizes]  # bits per byte of a sample
        bits = [size * each for size, each in zip(sizes, hard)]
        gains = [size * chance.gauss(-0.1, 0.2) for size in sizes]
        found = ratio(bits, sizes)
        pair = ratio(gains, sizes)
        covered += found.low <= 2.0 <= found.high
        covered_pairs += pair.low <= -0.1 <= pair.high
        assert pair.stderr < found.stderr
    assert 0.93 < covered / drawn < 0.97
    assert 0.93 < covered_pairs / drawn < 0.97


def test_mean_of_independent_estimates_adds_their_variances():
    parts = [Estimate(0.3, 0.03, 0.24, 0.36, 50), Estimate(0.6, 0.04, 0.52, 0.68, 70)]
    found = mean(parts)
    assert (found.value, found.problems) == (pytest.approx(0.45), 120)
    assert found.stderr == pytest.approx(0.025)  # half of the root of 0.03² + 0.04²
    assert (found.low, found.high) == (pytest.approx(0.40), pytest.approx(0.50))
    # Wilson's intervals stay asymmetric: if all problems of every task failed, the low end is 0.
    all_failed = mean([estimate([0.0] * 20)] * 3)
    assert all_failed.low == all_failed.stderr == 0
    assert 0.05 < all_failed.high < estimate([0.0] * 20).high
    with pytest.raises(UserError):
        mean([])


# The quantiles of Student's t that 2.5% exceed, from published tables.
@pytest.mark.parametrize(
    "freedom, t", [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_students_t_interval_has_the_quantile_of_published_tables(freedom, t):
    found = student(Estimate(1.0, 0.5, 0.0, 2.0, freedom + 1))
    assert (found.high - 1) / 0.5 == pytest.approx(t, rel=2e-3)
    assert found.low == pytest.approx(2 - found.high)


def test_students_t_interval_of_one_problem_is_nan():
    assert math.isnan(student(paired_difference({"a": 1}, {"a": 0})).low)
