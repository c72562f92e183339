"""Standard errors and 95% intervals of scores, and of paired differences of two checkpoints.

The unit of observation is a problem: its score is 0 or 1, or with several samples its pass@k. So
samples of one problem are never counted as independent.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

from retemper.pipeline.errors import UserError

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A score with its standard error and 95% interval, in the units of the score."""

    value: float
    stderr: float
    low: float
    high: float
    problems: int  # the number of problems, or of samples of text

    def headline(self, metric: str) -> dict:
        """Return the main score and its uncertainty with the keys of evals/<step>/<task>.json."""
        return {
            "metric": metric,
            "score": self.value,
            "stderr": self.stderr,
            "interval": [self.low, self.high],
            "samples": self.problems,
        }


def scores_by_problem(problems: Iterable[dict], metric: str) -> dict[int, float]:
    """Return problem id -> its score in a metric of lm-eval.

    Args:
        problems: lm-eval's records, one for each problem and filter.
        metric: "metric" or "metric/filter", such as exact_match/strict-match.
    """
    name, _, filter_name = metric.partition("/")
    return {
        problem["doc_id"]: float(problem[name])
        for problem in problems
        if not filter_name or problem["filter"] == filter_name
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that at least one of k samples drawn from the given ones passes.

    It is 1 - C(n - c, k) / C(n, k), unbiased for every n >= k, computed as a product as in Chen et
    al. 2021 (arXiv 2107.03374, figure 3), because the binomials do not fit into floats.

    Args:
        samples: The number n of samples.
        passed: The number c of samples that passed.
        k: The number of samples drawn.

    Raises:
        UserError: The numbers do not fit together, as with k > samples.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise UserError(
            f"pass@{k} of {samples} samples of which {passed} passed: "
            "k must be from 1 to the number of samples"
        )
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def estimate(scores: Sequence[float]) -> Estimate:
    """Estimate the mean of problems' scores, which are between 0 and 1.

    The standard error is s / sqrt(n) over problems: Miller 2024, "Adding Error Bars to Evals"
    (arXiv 2411.00640), section 2.1, and, as a problem's score is the mean of its samples, 2.2.

    The interval is Wilson's (1927), which stays within 0 and 1 and has a width even when all scores
    are equal. For fractional scores n is replaced by the effective number of problems,
    p(1 - p) / variance of the mean (Korn and Graubard 1998; for Wilson's interval, Franco et al.
    2019), which for zeros and ones is n.

    Raises UserError where there are no scores.
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
    """Estimate the mean difference of two checkpoints on the same problems, second minus first.

    The standard error is that of the mean of the problems' differences: Miller 2024 (arXiv
    2411.00640), section 4.2. It is smaller than that of two independent means, because a problem's
    difficulty, which both share, cancels. The interval is normal.

    Args:
        first: Problem -> score.
        second: Problem -> score.

    Raises:
        UserError: The problems differ, or there are none.
    """
    if first.keys() != second.keys():
        unpaired = sorted(map(str, first.keys() ^ second.keys()))
        raise UserError(
            "only checkpoints scored on the same problems are comparable: "
            f"{len(unpaired)} problems are in only one of them, such as {unpaired[0]}"
        )
    differences = [second[problem] - first[problem] for problem in first]
    n = _count(differences)
    mean = fmean(differences)
    error = _standard_error(math.fsum((difference - mean) ** 2 for difference in differences), n)
    return Estimate(mean, error, mean - _Z * error, mean + _Z * error, n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Estimate the ratio of two sums, such as bits per byte.

    The unit of observation is a sample, which has a numerator and a denominator. The standard error
    comes from the residuals numerator - ratio * denominator: Cochran 1977, "Sampling Techniques",
    section 6.4. The interval is normal. If the numerators are differences of two checkpoints on the
    same samples, this estimates their paired difference.

    Raises UserError where there are no samples.
    """
    n = _count(numerators)
    total = math.fsum(denominators)
    value = math.fsum(numerators) / total
    squares = math.fsum(
        (part - value * size) ** 2 for part, size in zip(numerators, denominators, strict=True)
    )
    error = _standard_error(squares, n) * n / total
    return Estimate(value, error, value - _Z * error, value + _Z * error, n)


def mean(parts: Sequence[Estimate]) -> Estimate:
    """Estimate the mean of independent estimates, such as those of several tasks or domains.

    The interval adds the squared distances from each value to its limits, which keeps asymmetric
    intervals asymmetric (Zou and Donner 2008, "Construction of confidence limits about effect
    measures"). For normal intervals it is the normal interval of the mean.

    Raises UserError where there are no estimates.
    """
    n = _count(parts)
    value = fmean(part.value for part in parts)
    error = math.hypot(*(part.stderr for part in parts)) / n
    below = math.hypot(*(part.value - part.low for part in parts)) / n
    above = math.hypot(*(part.high - part.value for part in parts)) / n
    problems = sum(part.problems for part in parts)
    return Estimate(value, error, value - below, value + above, problems)


def student(normal: Estimate) -> Estimate:
    """Replace an estimate's normal interval by Student's t interval.

    With few samples the normal interval misses the true value in more than 5% of cases: with ten
    samples, in 8%.
    """
    from scipy.stats import t  # takes a second to import, and only reports need it

    # With a single sample there is no degree of freedom, and the interval is nan.
    half_width = float(t.ppf(0.975, normal.problems - 1)) * normal.stderr
    return replace(normal, low=normal.value - half_width, high=normal.value + half_width)


def _standard_error(squares: float, n: int) -> float:
    """Return the standard error of a mean from the sum of squared deviations; nan for one value."""
    return math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


def _count(scores: Sized) -> int:
    if not scores:
        raise UserError("there are no problems to score")
    return len(scores)
