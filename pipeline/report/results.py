"""The results of a study's runs, read from their folders, and their comparison."""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.config.schedules import last_share, length_of, percent
from retemper.pipeline.config.stored import read_config
from retemper.pipeline.data.domains import domains_of
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.paired import Scored
from retemper.pipeline.report import verdicts
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.pipeline.schema.run import Config

# The kinds of points: where on its learning-rate schedule a run was scored.
START, TRUNK, COOLING = "start", "trunk", "cooling down"
COOLED, WARMING = "cooled down", "ended in the warm-up"
_ANNEALED = (COOLED, WARMING)  # the ends of milestones, which a study is about


@dataclass(frozen=True)
class RunResult:
    """The results of one run."""

    config: Config
    metrics: list[dict]  # the logged steps
    curves: dict[str, dict[int, float]]  # held-out bits per byte as {domain: {tokens: value}}
    # The run whose step 0 is the initial model, and in `curves` the point at 0 tokens: the run
    # itself or its trunk. None where the trunk is missing.
    start: Config | None

    @property
    def learned_domains(self) -> list[str]:
        """The scored domains of the text that it trained on."""
        return domains_of(self.config, self._followed).learned

    @property
    def old_domains(self) -> list[str]:
        """The other scored domains, which a continued run may forget."""
        return domains_of(self.config, self._followed).old

    @property
    def measures_both(self) -> bool:
        """Whether it is a continued run that was scored on both learned and old domains."""
        return bool(self.is_continued and self.learned_domains and self.old_domains)

    @property
    def _followed(self) -> list[str]:
        """The domains scored beyond the start; where there are none, those of the start.

        The start that a trunk shares with its branches may be scored on more than each of them.
        """
        beyond = [domain for domain, curve in self.curves.items() if curve.keys() != {0}]
        return beyond or list(self.curves)

    @property
    def is_continued(self) -> bool:
        """Whether it started from another run's weights."""
        return (self.start or self.config).init_from is not None

    @property
    def family(self) -> Path:
        """A key that a trunk and all of its branches share."""
        if self.start:
            return self.start.run_dir
        assert self.config.branch_of, "only a branch can lack its start"
        return Path(os.path.abspath(self.config.branch_of))

    def kind(self, tokens: int) -> str:
        """Return the kind of the point after `tokens`: START, TRUNK, COOLING, COOLED or WARMING."""
        config = self.config
        cosine = config.schedule.name == "cosine"
        if not tokens:
            return START
        if not cosine and not (config.schedule.name == "trapezoid" and config.cooldown_fraction):
            return TRUNK
        length = length_of(config)
        if tokens >= length:
            last_step_begins = length - config.tokens_per_step
            return WARMING if 0 < config.schedule.warmup_tokens >= last_step_begins else COOLED
        begins = config.cooldown_begins(config.train.tokens) * config.tokens_per_step
        decays_after = config.schedule.warmup_tokens if cosine else begins
        return COOLING if tokens > decays_after else TRUNK

    def gains(self) -> dict[int, tuple[float, float]]:
        """Return {tokens: (learned, forgotten)} of points where all domains were scored.

        Learned is the mean of the bits per byte gained on the learned domains since the start,
        forgotten the mean of those lost on the old domains. The result is empty where the start was
        not scored on all domains.
        """
        if not self.measures_both:
            return {}
        old = self.changes(self.old_domains)
        return {
            tokens: (learned, 0.0 - old[tokens])
            for tokens, learned in self.changes(self.learned_domains).items()
            if tokens in old
        }

    def changes(self, domains: list[str]) -> dict[int, float]:
        """Return {tokens: bits per byte gained since the start} where all domains were scored.

        The result is empty for a run that is not continued, or whose start was not scored.
        """
        if not (self.is_continued and domains and self.curves.keys() >= set(domains)):
            return {}
        scored = set.intersection(*(set(self.curves[domain]) for domain in domains))
        if 0 not in scored:
            return {}
        return {tokens: self.gained(domains, tokens) for tokens in sorted(scored)}

    def gained(self, domains: list[str], tokens: int) -> float:
        """Return the bits per byte gained since the start, as a mean over domains."""
        curves = [self.curves[domain] for domain in domains]
        return fmean(curve[0] - curve[tokens] for curve in curves)

    def tokens_per_second(self) -> float:
        """Return the median over the logged intervals; 0 before the first."""
        rates = sorted(record["tokens_per_second"] for record in self.metrics)
        return rates[len(rates) // 2] if rates else 0.0


def read_study(folder: Path) -> list[RunResult]:
    """Return all runs in a study's folder, base runs first.

    Raises:
        UserError: there is none.
    """
    # Imported and exported models have a config.json without the keys of a run.
    runs = [
        _read_run(path.parent)
        for path in sorted(folder.glob("*/config.json"))
        if "evals" in (read_config(path.parent) or {})
    ]
    if not runs:
        raise UserError(
            f"{folder} holds no run (a folder with config.json): "
            "name the folder of a study, as runs/demo"
        )
    return sorted(runs, key=lambda run: (run.is_continued, run.config.method.name, run.config.name))


def _read_run(folder: Path) -> RunResult:
    config = load_run(folder, [])
    curves: dict[str, dict[int, float]] = {}
    for step, scores in eval_folder.heldout_of(config).items():
        for domain, values in scores.items():
            curves.setdefault(domain, {})[step * config.tokens_per_step] = values["bits_per_byte"]
    metrics = list(run_folder.read_metrics(folder))
    return RunResult(config, metrics, curves, eval_folder.start_of(config))


@dataclass(frozen=True)
class _Point:
    """A run after some tokens, where learned and forgotten are known."""

    run: RunResult
    tokens: int

    @property
    def kind(self) -> str:
        return self.run.kind(self.tokens)

    @property
    def scored(self) -> Scored:
        return Scored(self.run.config, self.tokens // self.run.config.tokens_per_step)

    def gained(self, domains: list[str]) -> float:
        return self.run.gained(domains, self.tokens)


def comparison(runs: list[RunResult]) -> list[str]:
    """Return sentences on whether each LoRA run learned and forgot less than each full run.

    Runs on the same data are compared at equal tokens and points of one kind, a trunk together with
    its branches: at every milestone whose learning rate was cooled down, or which ended in the
    warm-up; where there is none, at the last point of another kind. The longest come first.
    Sentences on runs without anything to compare follow.
    """
    families: dict[Path, list[_Point]] = {}
    for run in runs:
        for tokens in run.gains():
            families.setdefault(run.family, []).append(_Point(run, tokens))
    pairs = product(_of_method("lora", families), _of_method("full", families))
    alike = [pair for pair in pairs if _share_domains(*(points[0].run for points in pair))]
    sentences = [sentence for pair in alike for sentence in _compare(*pair)]
    sentences = sentences or ["The study has no pair of a full and a LoRA run to compare."]
    return sentences + [sentence for run in runs for sentence in _missing_scores(run)]


def _of_method(name: str, families: dict[Path, list[_Point]]) -> list[list[_Point]]:
    return [points for points in families.values() if points[0].run.config.method.name == name]


def _share_domains(one: RunResult, other: RunResult) -> bool:
    """Return whether both have the same learned domains and a common old domain."""
    old = set(one.old_domains) & set(other.old_domains)
    return set(one.learned_domains) == set(other.learned_domains) and bool(old)


def _compare(lora: list[_Point], full: list[_Point]) -> list[str]:
    both = [(one, other) for one, other in product(lora, full) if one.tokens == other.tokens > 0]
    alike = [(one, other) for one, other in both if one.kind == other.kind]
    alike.sort(key=lambda pair: -pair[0].tokens)
    if annealed := [pair for pair in alike if pair[0].kind in _ANNEALED]:
        return [_verdict(*pair) for pair in annealed]
    if alike:
        return [_verdict(*alike[0])]
    if not both:
        return [f"{_names(lora[0], full[0])}: no milestone that both have reached yet."]
    one, other = max(both, key=lambda pair: pair[0].tokens)
    return [
        f"{_names(one, other)}: not compared, for they have no points of equal tokens and equal "
        f"kind: after {one.tokens:,} tokens {one.run.config.name} is {_kind_words(one)}, "
        f"{other.run.config.name} {_kind_words(other)}."
    ]


def _kind_words(point: _Point) -> str:
    return "a point of a trunk" if point.kind == TRUNK else point.kind


def _names(lora: _Point, full: _Point) -> str:
    return f"{lora.run.config.name} (LoRA) beside {full.run.config.name} (full)"


def _verdict(lora: _Point, full: _Point) -> str:
    # Means over different domains would not be comparable.
    old = [domain for domain in lora.run.old_domains if domain in full.run.old_domains]
    learned = lora.run.learned_domains
    gains = lora.gained(learned), full.gained(learned)
    losses = 0.0 - lora.gained(old), 0.0 - full.gained(old)
    scored = lora.scored, full.scored
    learned_verdict, learned_clause = verdicts.learned(*scored, learned, gains)
    forgot_verdict, forgot_clause = verdicts.forgot(*scored, old, losses)
    clauses = [learned_clause, forgot_clause, *filter(None, [verdicts.kept(*scored)])]
    kind = "" if lora.kind == COOLED else f" ({lora.kind})"
    return (
        f"{_names(lora, full)}, after {lora.tokens:,} tokens{kind}: {'; '.join(clauses)}. "
        "One seed; interval over held-out samples. "
        + verdicts.conclusion(learned_verdict, forgot_verdict, losses)
    )


def _missing_scores(run: RunResult) -> list[str]:
    """Return a sentence if a run has no scores, or no learned and forgotten without its start's."""
    if not run.curves:
        heldout = "" if run.config.evals.heldout else " evals.heldout.NAME=FOLDER"
        command = f"retemper eval run {run.config.run_dir}{heldout}"
        return [f"{run.config.name}: no held-out scores: `{command}` computes them."]
    if run.gains() or not run.measures_both:
        return []
    begins = f"{run.config.name}: nothing to compare with, for "
    if run.start is None:
        trunk = run.config.branch_of
        return [f"{begins}its trunk {trunk} is gone, and its start with it."]
    if missing := [domain for domain, curve in run.curves.items() if 0 not in curve]:
        unknown = [domain for domain in missing if domain not in run.config.evals.heldout]
        overrides = [f"evals.heldout.{domain}=FOLDER" for domain in unknown]
        command = " ".join(["retemper eval run", str(run.config.run_dir), *overrides])
        listed = ", ".join(missing)
        return [f"{begins}its start was not scored on {listed}: `{command}` does it."]
    return []


def table(runs: list[RunResult]) -> list[list[str]]:
    """Return rows for the terminal and the page, the header first.

    There is a row for every evaluated step of every run; cells without a score are blank.
    """
    domains = sorted({domain for run in runs for domain in run.curves})
    rows = [
        [
            "run",
            "method",
            "tokens",
            "point",
            *(f"{domain} bits/byte" for domain in domains),
            "learned",
            "forgotten",
            "tokens/s",
        ]
    ]
    folders = {run.config.run_dir for run in runs}
    for run in runs:
        scored = sorted({tokens for curve in run.curves.values() for tokens in curve})
        if run.config.branch_of and run.family in folders:
            scored = [tokens for tokens in scored if tokens]  # its start is a row of its trunk
        for tokens in scored:
            scores = [
                f"{curve[tokens]:.4f}" if tokens in (curve := run.curves.get(domain, {})) else ""
                for domain in domains
            ]
            learned = run.changes(run.learned_domains).get(tokens)
            old = run.changes(run.old_domains).get(tokens)
            gains = [
                "" if learned is None else f"{learned:+.3f}",
                "" if old is None else f"{0.0 - old:+.3f}",
            ]
            rate = f"{run.tokens_per_second():,.0f}" if tokens == scored[-1] else ""
            rows.append(
                [
                    run.config.name,
                    run.config.method.name,
                    f"{tokens:,}",
                    _kind_cell(run, tokens),
                    *scores,
                    *gains,
                    rate,
                ]
            )
    return rows


def _kind_cell(run: RunResult, tokens: int) -> str:
    kind = run.kind(tokens)
    if kind != WARMING:
        return kind
    return f"{kind}, at {percent(last_share(run.config))} of the peak rate"


def format_table(rows: list[list[str]]) -> str:
    """Return the rows as aligned text."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = [
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths)) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
