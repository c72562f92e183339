"""What a comparison of two runs says: each difference with its 95% interval, and no more."""

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


def verdict(found: Estimate) -> str:
    """Whether a difference is LESS or MORE than zero by more than its 95% interval, else NONE."""
    if found.high < 0:
        return LESS
    return MORE if found.low > 0 else NONE


def learned(
    first: Scored, second: Scored, domains: list[str], gains: tuple[float, float]
) -> tuple[str, str]:
    """A verdict, and a clause on which of two runs gained more bits per byte on what it learned.

    gains: of the first and the second, means over the domains, as they are reported.
    """

    def gained() -> Estimate:
        return _gain_difference(second, first, domains)

    return _clause("learned", gains, ", ".join(domains), gained)


def forgot(
    first: Scored, second: Scored, domains: list[str], losses: tuple[float, float]
) -> tuple[str, str]:
    """A verdict, and a clause on which of two runs lost more bits per byte on its old domains.

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
    said, clause = _clause(both, gains, listed, gained, of=f", {first.config.name}")
    within = [each for each in (first, second) if not _is_beyond(each, domains)]
    doubts = [f"{each.config.name} not beyond its own 95% interval" for each in within]
    return said, "; ".join([clause, *doubts])


def kept(first: Scored, second: Scored) -> str | None:
    """A clause on which of two runs has the higher forgetting score; None where one has none."""
    both = [eval_folder.tasks_of(each.config, each.step) for each in (first, second)]
    scores = tuple(eval_folder.forgetting(tasks) for tasks in both)
    if None in scores:
        return None
    try:
        parts = [task_difference(second, first, task) for task in eval_folder.FORGOTTEN]
        found = mean([student(part) for part in parts])
    except UserError as error:
        said = f"{_UNKNOWN} ({error})"
    else:
        words = {LESS: "lower", MORE: "higher", NONE: NONE}
        said = f"{words[verdict(found)]} ({_interval(found)})"
    return f"forgetting score, {scores[0]:.3f} against {scores[1]:.3f} on {_TASKS}: {said}"


def conclusion(learned_said: str, forgot_said: str, losses: tuple[float, float]) -> str:
    """How two verdicts stand to the paper's finding."""
    if all(loss < 0 for loss in losses):
        return f"Nothing was forgotten that could be compared with what {_FOUND}"
    if learned_said == forgot_said == LESS:
        return f"As {_FOUND}"
    if MORE in (learned_said, forgot_said):
        return f"Not as {_FOUND}"
    return f"Not decided whether as {_FOUND}"


def _clause(
    what: str,
    values: tuple[float, float],
    domains: str,
    difference: Callable[[], Estimate],
    of: str = "",
) -> tuple[str, str]:
    """A verdict, and it in words; of: whose less or more it is, where `what` is of both."""
    try:
        found = difference()
    except UserError as error:
        said = _UNKNOWN
        interval = f"no interval: {error}"
    else:
        said = verdict(found)
        interval = _interval(found)
    words = f"{what}{of} {said}" if said in (LESS, MORE) else f"{what}: {said}"
    numbers = f"{values[0] + 0.0:+.3f} against {values[1] + 0.0:+.3f} bits/byte on {domains}"
    return said, f"{words}, {numbers} ({interval})"


def _gain_difference(first: Scored, second: Scored, domains: list[str]) -> Estimate:
    """The mean over domains of what the second run gained more than the first."""
    parts = [gain_difference(first, second, domain) for domain in domains]
    return mean([student(part) for part in parts])


def _replayed(domain: str, *runs: Scored) -> str:
    """A remark on an old domain whose text was mixed into the training of some of the runs."""
    by = [run.config.name for run in runs if domain in domains_of(run.config).replayed]
    if len(by) == len(runs):
        return " (replayed)"
    return f" (replayed by {', '.join(by)})" if by else ""


def _interval(found: Estimate) -> str:
    if found.low != found.low:
        return f"difference {found.value:+.3f}, of one sample and without an interval"
    return f"difference {found.value:+.3f}, 95% interval {found.low:+.3f} to {found.high:+.3f}"


def _is_beyond(scored: Scored, domains: list[str]) -> bool:
    """Whether a run's own gain on its old domains is more than its interval."""
    try:
        parts = [heldout_difference(scored.start, scored, domain) for domain in domains]
    except UserError:
        return True  # the clause says what is missing
    return verdict(mean([student(part) for part in parts])) == LESS


def _negated(found: Estimate) -> Estimate:
    return Estimate(-found.value, found.stderr, -found.high, -found.low, found.problems)
