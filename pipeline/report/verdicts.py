"""The sentences of a comparison of two runs: each difference with its 95% interval."""

from collections.abc import Callable

from retemper.pipeline.data.domains import domains_of
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.paired import (
    Scored,
    gain_difference,
    heldout_difference,
    task_difference,
)
from retemper.pipeline.evals.uncertainty import Estimate, mean, student
from retemper.pipeline.runs import eval_folder

LESS, MORE, NONE = "less", "more", "no difference measured"
_UNKNOWN = "no verdict"
_FOUND = '"LoRA Learns Less and Forgets Less" found.'
_TASKS = "HellaSwag, ARC-Challenge and WinoGrande"


def verdict(difference: Estimate) -> str:
    """Return LESS or MORE where the 95% interval of a difference is below or above 0, else NONE."""
    if difference.high < 0:
        return LESS
    return MORE if difference.low > 0 else NONE


def learned(
    first: Scored, second: Scored, domains: list[str], gains: tuple[float, float]
) -> tuple[str, str]:
    """Return a verdict and a clause on which run gained more bits per byte on the learned domains.

    Args:
        first: a scored run; the verdict is on its gain compared with that of the second.
        second: the other run.
        domains: that both runs learned.
        gains: of the first and the second, means over the domains, as they are reported.
    """

    def gained() -> Estimate:
        return _gain_difference(second, first, domains)

    return _clause("learned", gains, ", ".join(domains), gained)


def forgot(
    first: Scored, second: Scored, domains: list[str], losses: tuple[float, float]
) -> tuple[str, str]:
    """Return a verdict and a clause on which run lost more bits per byte on the old domains.

    Args:
        first: a scored run; the verdict is on its loss compared with that of the second.
        second: the other run.
        domains: old domains of both.
        losses: of the first and the second, means over the domains, as they are reported.
    """
    listed = ", ".join(domain + _replayed(domain, first, second) for domain in domains)

    def gained() -> Estimate:
        return _gain_difference(second, first, domains)

    def lost() -> Estimate:
        return _negated(gained())

    if not all(loss < 0 for loss in losses):
        return _clause("forgot", losses, listed, lost)
    gains = (-losses[0], -losses[1])
    old = "the old domain" if len(domains) == 1 else "the old domains"
    both = f"both improved on {old}"
    outcome, clause = _clause(both, gains, listed, gained, of=f", {first.config.name}")
    within = [each for each in (first, second) if not _is_beyond(each, domains)]
    doubts = [f"{each.config.name} not beyond its own 95% interval" for each in within]
    return outcome, "; ".join([clause, *doubts])


def kept(first: Scored, second: Scored) -> str | None:
    """Return a clause on which run has the higher forgetting score, or None if one has no score."""
    both = [eval_folder.tasks_of(each.config, each.step) for each in (first, second)]
    scores = tuple(eval_folder.forgetting(tasks) for tasks in both)
    if None in scores:
        return None
    try:
        parts = [task_difference(second, first, task) for task in eval_folder.FORGETTING_TASKS]
        difference = mean([student(part) for part in parts])
    except UserError as error:
        result = f"{_UNKNOWN} ({error})"
    else:
        words = {LESS: "lower", MORE: "higher", NONE: NONE}
        result = f"{words[verdict(difference)]} ({_interval(difference)})"
    return f"forgetting score, {scores[0]:.3f} against {scores[1]:.3f} on {_TASKS}: {result}"


def conclusion(learned_verdict: str, forgot_verdict: str, losses: tuple[float, float]) -> str:
    """Return a sentence that compares two verdicts with the paper's finding.

    Args:
        learned_verdict: from `learned`.
        forgot_verdict: from `forgot`.
        losses: of both runs on the old domains, in bits per byte.
    """
    if all(loss < 0 for loss in losses):
        return f"Nothing was forgotten that could be compared with what {_FOUND}"
    if learned_verdict == forgot_verdict == LESS:
        return f"As {_FOUND}"
    if MORE in (learned_verdict, forgot_verdict):
        return f"Not as {_FOUND}"
    return f"Not decided whether as {_FOUND}"


def _clause(
    what: str,
    values: tuple[float, float],
    domains: str,
    difference: Callable[[], Estimate],
    of: str = "",
) -> tuple[str, str]:
    """Return a verdict and a clause that states it.

    of: ", " and the run that the verdict is on, where `what` is a statement on both runs.
    """
    try:
        estimate = difference()
    except UserError as error:
        outcome = _UNKNOWN
        interval = f"no interval: {error}"
    else:
        outcome = verdict(estimate)
        interval = _interval(estimate)
    words = f"{what}{of} {outcome}" if outcome in (LESS, MORE) else f"{what}: {outcome}"
    numbers = f"{values[0] + 0.0:+.3f} against {values[1] + 0.0:+.3f} bits/byte on {domains}"
    return outcome, f"{words}, {numbers} ({interval})"


def _gain_difference(first: Scored, second: Scored, domains: list[str]) -> Estimate:
    """Return by how much the second run gained more than the first, as a mean over domains."""
    parts = [gain_difference(first, second, domain) for domain in domains]
    return mean([student(part) for part in parts])


def _replayed(domain: str, *runs: Scored) -> str:
    """Return a remark on an old domain if its text was mixed into the training of some runs."""
    by = [run.config.name for run in runs if domain in domains_of(run.config).replayed]
    if len(by) == len(runs):
        return " (replayed)"
    return f" (replayed by {', '.join(by)})" if by else ""


def _interval(difference: Estimate) -> str:
    value = f"{difference.value:+.3f}"
    low, high = difference.low, difference.high
    if low != low:  # NaN
        return f"difference {value}, of one sample and without an interval"
    return f"difference {value}, 95% interval {low:+.3f} to {high:+.3f}"


def _is_beyond(scored: Scored, domains: list[str]) -> bool:
    """Return whether a run's gain on its old domains exceeds its 95% interval."""
    try:
        parts = [heldout_difference(scored.start, scored, domain) for domain in domains]
    except UserError:
        return True  # the clause names what is missing
    return verdict(mean([student(part) for part in parts])) == LESS


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(
        -estimate.value, estimate.stderr, -estimate.high, -estimate.low, estimate.problems
    )
