"""What the runs of a study measured, read from their folders."""

from dataclasses import dataclass
from pathlib import Path

from retemper.pipeline import eval_folder, run_folder
from retemper.pipeline.config import load_run
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class RunResult:
    """One run: its config, its logged steps, and its held-out bits per byte as domain -> tokens -> value."""

    config: Config
    metrics: list[dict]
    curves: dict[str, dict[int, float]]

    @property
    def learned_domain(self) -> str | None:
        """The held-out domain of the corpus it trained on."""
        return self.config.data.name if self.config.data.name in self.curves else None

    @property
    def old_domains(self) -> list[str]:
        """The other held-out domains: what a continued run may forget."""
        return [domain for domain in self.curves if domain != self.config.data.name]

    @property
    def is_continued(self) -> bool:
        """Whether it started from another run's weights."""
        return self.config.init_from is not None

    def gains(self) -> dict[int, tuple[float, float]]:
        """tokens -> (learned, forgotten), where all of its domains were scored there and at the start; else empty.

        Learned: bits per byte gained on the trained domain since the start. Forgotten: bits per byte lost on the others, their mean.
        """
        if not (self.is_continued and self.learned_domain and self.old_domains):
            return {}
        scored = set.intersection(*(set(curve) for curve in self.curves.values()))
        if 0 not in scored:
            return {}
        gained = {tokens: {domain: curve[0] - curve[tokens] for domain, curve in self.curves.items()} for tokens in sorted(scored)}
        return {
            tokens: (by_domain[self.learned_domain], 0.0 - sum(by_domain[domain] for domain in self.old_domains) / len(self.old_domains))
            for tokens, by_domain in gained.items()
        }

    def tokens_per_second(self) -> float:
        """Median over the logged intervals; 0 before the first."""
        rates = sorted(record["tokens_per_second"] for record in self.metrics)
        return rates[len(rates) // 2] if rates else 0.0


def read_study(folder: Path) -> list[RunResult]:
    """All runs below a study's folder, base runs first. Raises UserError where there is none."""
    runs = [_read_run(path.parent) for path in sorted(folder.glob("*/config.json"))]
    if not runs:
        raise UserError(f"{folder} holds no run (a folder with config.json): name the folder of a study, as runs/demo")
    return sorted(runs, key=lambda run: (run.is_continued, run.config.method.name, run.config.name))


def _read_run(folder: Path) -> RunResult:
    config = load_run(folder, [])
    curves: dict[str, dict[int, float]] = {}
    for step, scores in eval_folder.read_scores(folder).items():
        for domain, values in scores.items():
            curves.setdefault(domain, {})[step * config.tokens_per_step] = values["bits_per_byte"]
    return RunResult(config, list(run_folder.read_metrics(folder)), curves)


def comparison(runs: list[RunResult]) -> list[str]:
    """For every LoRA run beside every full run of the same data: did it learn less and forget less, at equal tokens?

    Says what was measured, whichever way it fell.
    """
    full, lora = ([run for run in runs if run.gains() and run.config.method.name == name] for name in ("full", "lora"))
    pairs = [(one, other) for one in lora for other in full if one.learned_domain == other.learned_domain]
    return [_compare(one, other) for one, other in pairs] or ["The study has no pair of a full and a LoRA run to compare."]


def _compare(lora: RunResult, full: RunResult) -> str:
    names = f"{lora.config.name} (LoRA) beside {full.config.name} (full)"
    tokens = max(lora.gains().keys() & full.gains().keys())
    if not tokens:
        return f"{names}: no milestone that both have reached yet."
    (learned, forgotten), (full_learned, full_forgotten) = lora.gains()[tokens], full.gains()[tokens]
    less_learned, less_forgotten = learned < full_learned, forgotten < full_forgotten
    return (
        f"{names}, after {tokens:,} tokens: learned {'less' if less_learned else 'no less'}, {learned:+.3f} against {full_learned:+.3f} "
        f"bits/byte on {lora.learned_domain}; forgot {'less' if less_forgotten else 'no less'}, {forgotten:+.3f} against {full_forgotten:+.3f} "
        f"on {', '.join(lora.old_domains)}. "
        + ("As " if less_learned and less_forgotten else "Not as ")
        + '"LoRA Learns Less and Forgets Less" found.'
    )


def table(runs: list[RunResult]) -> list[list[str]]:
    """Rows for the terminal and the page, the header first: every evaluated step of every run; what was not scored is blank."""
    domains = sorted({domain for run in runs for domain in run.curves})
    rows = [["run", "method", "tokens", *(f"{domain} bits/byte" for domain in domains), "learned", "forgotten", "tokens/s"]]
    for run in runs:
        scored = sorted({tokens for curve in run.curves.values() for tokens in curve})
        for tokens in scored:
            scores = [f"{curve[tokens]:.4f}" if tokens in (curve := run.curves.get(domain, {})) else "" for domain in domains]
            gains = [f"{value:+.3f}" for value in run.gains().get(tokens, ())] or ["", ""]
            rate = f"{run.tokens_per_second():,.0f}" if tokens == scored[-1] else ""
            rows.append([run.config.name, run.config.method.name, f"{tokens:,}", *scores, *gains, rate])
    return rows


def format_table(rows: list[list[str]]) -> str:
    """The rows as aligned text."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = ["  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
