"""What the runs of a study measured, read from their folders."""

from dataclasses import dataclass
from pathlib import Path

from retemper.pipeline import run_folder
from retemper.pipeline.config import Config, check_config
from retemper.pipeline.errors import UserError


@dataclass(frozen=True)
class Point:
    """Bits per byte of one domain after some tokens."""

    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class RunResult:
    """One run: its config, its logged steps, and its held-out curves by domain."""

    config: Config
    metrics: list[dict]
    curves: dict[str, list[Point]]

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

    @property
    def measures_forgetting(self) -> bool:
        """Whether there is something to learn, something to forget, and scores of both."""
        return self.is_continued and self.learned_domain is not None and bool(self.old_domains)

    def learned(self) -> list[float]:
        """Bits per byte gained on the trained domain since the start, at each evaluated step; positive is better."""
        points = self.curves[self.learned_domain]
        return [points[0].bits_per_byte - point.bits_per_byte for point in points]

    def forgotten(self) -> list[float]:
        """Bits per byte lost on the old domains since the start, their mean, at each evaluated step; positive is worse."""
        curves = [self.curves[domain] for domain in self.old_domains]
        return [
            sum(point.bits_per_byte - points[0].bits_per_byte for point, points in zip(at, curves)) / len(curves) for at in zip(*curves)
        ]

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
    import json

    config = check_config(json.loads((folder / "config.json").read_text()))
    curves: dict[str, list[Point]] = {}
    for step, scores in run_folder.read_scores(folder).items():
        for domain, values in scores.items():
            curves.setdefault(domain, []).append(Point(step * config.tokens_per_step, values["bits_per_byte"]))
    return RunResult(config, list(run_folder.read_metrics(folder)), curves)


def comparison(runs: list[RunResult]) -> str:
    """One sentence a finding: did LoRA learn less and forget less here? Says what was measured, whichever way it fell."""
    continued = [run for run in runs if run.measures_forgetting]
    full = next((run for run in continued if run.config.method.name == "full"), None)
    lora = next((run for run in continued if run.config.method.name == "lora"), None)
    if not full or not lora:
        return "The study has no pair of a full and a LoRA run to compare."
    learned, forgotten = (full.learned()[-1], lora.learned()[-1]), (full.forgotten()[-1], lora.forgotten()[-1])
    verdicts = [
        f"LoRA learned {'less' if learned[1] < learned[0] else 'no less'}: {learned[1]:+.3f} bits/byte on {full.learned_domain} against {learned[0]:+.3f} in full",
        f"and forgot {'less' if forgotten[1] < forgotten[0] else 'no less'}: {forgotten[1]:+.3f} bits/byte on {', '.join(full.old_domains)} against {forgotten[0]:+.3f}",
    ]
    expected = learned[1] < learned[0] and forgotten[1] < forgotten[0]
    return ", ".join(verdicts) + (". As the paper found." if expected else ". The paper found less of both; this run did not.")


def table(runs: list[RunResult]) -> list[list[str]]:
    """Rows for the terminal and the page, the header first: every evaluated step of every run."""
    domains = sorted({domain for run in runs for domain in run.curves})
    rows = [["run", "method", "tokens", *(f"{domain} bits/byte" for domain in domains), "learned", "forgotten", "tokens/s"]]
    for run in runs:
        points = list(zip(*(run.curves[domain] for domain in domains))) if set(domains) <= run.curves.keys() else []
        gains = zip(run.learned(), run.forgotten()) if run.measures_forgetting else [None] * len(points)
        for at, gain in zip(points, gains):
            scores = [f"{point.bits_per_byte:.4f}" for point in at]
            signed = [f"{value:+.3f}" for value in gain] if gain else ["", ""]
            rate = f"{run.tokens_per_second():,.0f}" if at is points[-1] else ""
            rows.append([run.config.name, run.config.method.name, f"{at[0].tokens:,}", *scores, *signed, rate])
    return rows


def format_table(rows: list[list[str]]) -> str:
    """The rows as aligned text."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = ["  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
