"""report.html: one self-contained page for a study, and its figures as PNG beside it."""

import html
import io
from importlib.metadata import version
from pathlib import Path

from retemper.pipeline.config.compose import to_yaml
from retemper.pipeline.corpus.manifest import describe_near_duplicates, find_manifest
from retemper.pipeline.data.streams import stream_paths
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals import show_scores
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.report.results import (
    RunResult,
    comparison,
    format_table,
    read_study,
    table,
)
from retemper.pipeline.runs import eval_folder

# A backslash continues a line.
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; \
margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } \
.finding { font-size: 1.15rem; border-left: 4px solid #D55E00; padding-left: 1rem; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; } figcaption { color: #555; }
.scroll { overflow-x: auto; } \
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; \
white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } \
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""
_CAPTIONS = {
    "learning_forgetting": "Each point is a milestone's checkpoint, "
    "scored on documents that no run trained on.",
    "training_loss": "Training loss of each logged step, and tokens per second between them.",
}


def report(study: Path) -> str:
    """Write study/report.html and study/figures/*.png for the runs of a study.

    Returns:
        The table of its runs, their comparison and the path of the page, for the terminal.

    Raises:
        UserError: The study has no run.
    """
    runs = read_study(study)
    sentences = "\n".join(comparison(runs))
    return f"{format_table(table(runs))}\n\n{sentences}\n\nreport: {_write(study, runs)}"


def _write(study: Path, runs: list[RunResult]) -> Path:
    from retemper.pipeline.report.figures import FIGURES

    folder = study / "figures"
    folder.mkdir(exist_ok=True)
    drawings = {}
    for name, draw in FIGURES.items():
        figure = draw(runs)
        buffer = io.StringIO()
        figure.savefig(folder / f"{name}.png", dpi=110)
        figure.savefig(buffer, format="svg")
        drawings[name] = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    page = study / "report.html"
    replace_file(page, _page(study.name, runs, drawings))
    return page


def _page(title: str, runs: list[RunResult], drawings: dict[str, str]) -> str:
    figures = "".join(
        f"<figure>{svg}<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
        for name, svg in drawings.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} – retemper</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}: what was learned, what was forgotten</h1>
{"".join(f'<p class="finding">{html.escape(sentence)}</p>' for sentence in comparison(runs))}
{figures}
<h2>Every evaluated step</h2>
<p>Bits per byte on held-out documents, lower is better. \
Learned: bits per byte gained since the start
of the run on the domains it trained on, their mean. \
Forgotten: bits per byte lost on the others, their mean. \
A point of a trunk was scored at a rate that had not been cooled
down; runs are compared at equal tokens and points of one kind.</p>
<div class="scroll">{_table(table(runs))}</div>
{_corpora(runs)}
{_tasks(runs)}
<h2>Resolved configs</h2>
{"".join(_config(run) for run in runs)}
<p><small>{_versions()}</small></p>
</body></html>
"""


def _corpora(runs: list[RunResult]) -> str:
    """Return a section on near-duplicates of held-out text in each training corpus."""
    paths = sorted({path for run in runs for path in stream_paths(run.config).values()})
    lines = [line for path in paths for line in _near_duplicates(path)]
    if not lines:
        return ""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>Training text like held-out text</h2>\n<ul>{listed}</ul>"


def _near_duplicates(path: str) -> list[str]:
    """Return a line on one corpus, or none if it has no held-out text or cannot be read here."""
    try:
        manifest = find_manifest(path)
    except UserError:
        return []
    if manifest is None:
        return []
    line = describe_near_duplicates(manifest)
    return [f"{manifest['name']}: {line}"] if line else []


def _tasks(runs: list[RunResult]) -> str:
    steps = [
        (run.config, step) for run in runs for step in eval_folder.scored_steps(run.config.run_dir)
    ]
    rows = [
        [config.name, *row] for config, step in steps for row in show_scores.task_rows(config, step)
    ]
    if not rows:
        return ""
    caption = (
        "Scores of lm-eval's tasks, and their paired difference from the model that the run, "
        "or its trunk, began from, with its standard error and 95% interval."
    )
    scores = _table([["run", *show_scores.COLUMNS], *rows])
    return f'<h2>Tasks</h2>\n<p>{caption}</p>\n<div class="scroll">{scores}</div>'


def _table(rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def _config(run: RunResult) -> str:
    name = html.escape(run.config.name)
    config = html.escape(to_yaml(run.config))
    return f"<details><summary>{name}</summary><pre>{config}</pre></details>"


def _versions() -> str:
    names = (
        "retemper",
        "torch",
        "megatron-core",
        "mosaicml-streaming",
        "datatrove",
        "transformers",
    )
    return ", ".join(f"{name} {version(name)}" for name in names)
