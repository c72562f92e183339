"""How far a score may be off: standard errors, 95% intervals, and the difference between two checkpoints on the same problems.

A problem is the unit that varies: its score is 0 or 1, or, of many samples, its pass@k. So samples of one problem are never
counted as independent.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

from retemper.pipeline.errors import UserError

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A score over `problems` problems, or samples of text, with its standard error and 95% interval, in the units of the score."""

    value: float
    stderr: float
    low: float
    high: float
    problems: int

    def headline(self, metric: str) -> dict:
        """A task's one number, and how far it may be off, as evals/<step>/<task>.json has them."""
        return {
            "metric": metric,
            "score": self.value,
            "stderr": self.stderr,
            "interval": [self.low, self.high],
            "samples": self.problems,
        }


def scores_by_problem(problems: Iterable[dict], metric: str) -> dict[int, float]:
    """Each problem's part in a metric of lm-eval's, which may name the filter that it is of, as exact_match/strict-match."""
    name, _, of_filter = metric.partition("/")
    return {
        problem["doc_id"]: float(problem[name])
        for problem in problems
        if not of_filter or problem["filter"] == of_filter
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples drawn from these passes: 1 - C(n - c, k) / C(n, k), unbiased for every n >= k.

    As a product, as in Chen et al. 2021 (arXiv 2107.03374, figure 3): the binomials do not fit into floats.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise UserError(
            f"pass@{k} of {samples} samples of which {passed} passed: k must be from 1 to the number of samples"
        )
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def estimate(scores: Sequence[float]) -> Estimate:
    """Of the mean of problems' scores between 0 and 1.

    Standard error s / sqrt(n) over problems: Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640), section 2.1, and, as a
    problem's score is the mean of its samples, 2.2. Interval: Wilson's (1927), which keeps within 0 and 1 and is no point when
    all scores are equal; for fractions with the effective number of problems p(1 - p) / variance of the mean in place
    of n (Korn and Graubard 1998; for Wilson's, Franco et al. 2019), which for zeros and ones is n.
    """
    n = _count(scores)
    mean = fmean(scores)
    squares = math.fsum((score - mean) ** 2 for score in scores)
    effective = n * n * mean * (1 - mean) / squares if squares else n
    middle = (mean + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = (
        _Z
        / (1 + _Z**2 / effective)
        * math.sqrt(max(0, mean * (1 - mean)) / effective + (_Z / (2 * effective)) ** 2)
    )
    return Estimate(
        mean,
        _standard_error(squares, n),
        max(0.0, min(mean, middle - half)),
        min(1.0, max(mean, middle + half)),
        n,
    )


def paired_difference(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float]
) -> Estimate:
    """Of second minus first, each problem -> score, on the same problems.

    The standard error of the mean of the problems' differences: Miller 2024 (arXiv 2411.00640), section 4.2. What makes a problem hard
    for both cancels, so it is smaller than that of two means. Normal interval. Raises UserError where the problems differ.
    """
    if first.keys() != second.keys():
        apart = sorted(map(str, first.keys() ^ second.keys()))
        raise UserError(
            f"only checkpoints scored on the same problems compare: {len(apart)} are in one alone, {apart[0]} among them"
        )
    differences = [second[problem] - first[problem] for problem in first]
    n = _count(differences)
    mean = fmean(differences)
    error = _standard_error(math.fsum((difference - mean) ** 2 for difference in differences), n)
    return Estimate(mean, error, mean - _Z * error, mean + _Z * error, n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Of a sum over a sum, as bits over bytes; a sample, with its part of both, is the unit that varies.

    Standard error from the residuals numerator - ratio * denominator: Cochran 1977, "Sampling Techniques", section 6.4. Normal interval.
    With the differences of two checkpoints on the same samples as numerators it is of their paired difference.
    """
    n = _count(numerators)
    whole = math.fsum(denominators)
    value = math.fsum(numerators) / whole
    squares = math.fsum(
        (part - value * size) ** 2 for part, size in zip(numerators, denominators, strict=True)
    )
    error = _standard_error(squares, n) * n / whole
    return Estimate(value, error, value - _Z * error, value + _Z * error, n)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """Of the mean of independent estimates, as of several tasks or domains.

    Interval: the parts' distances to their limits, squared and summed, which keeps their shapes
    (Zou and Donner 2008, "Construction of confidence limits about effect measures"); for normal
    intervals it is the normal one of the mean.
    """
    n = _count(parts)
    value = fmean(part.value for part in parts)
    error = math.hypot(*(part.stderr for part in parts)) / n
    below = math.hypot(*(part.value - part.low for part in parts)) / n
    above = math.hypot(*(part.high - part.value for part in parts)) / n
    problems = sum(part.problems for part in parts)
    return Estimate(value, error, value - below, value + above, problems)


def student(found: Estimate) -> Estimate:
    """The same with Student's interval in place of the normal one.

    With few samples the normal one leaves out more than 5%: of ten, 8%.
    """
    from scipy.stats import t  # a second to import, and only reports compare

    # Without a degree of freedom it is nan.
    reach = float(t.ppf(0.975, found.problems - 1)) * found.stderr
    return replace(found, low=found.value - reach, high=found.value + reach)


def _standard_error(squares: float, n: int) -> float:
    """Of a mean, from the sum of squared deviations; of a single value nothing is known."""
    return math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


def _count(scores: Sequence[float]) -> int:
    if not scores:
        raise UserError("there is no problem to score")
    return len(scores)
