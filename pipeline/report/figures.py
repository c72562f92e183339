"""The figures of a report, drawn by matplotlib."""

import math
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retemper.pipeline.report.results import RunResult

# Okabe and Ito's palette, distinguishable with any colour vision: warm colours for full runs, cool
# ones for LoRA.
_COLOURS = {
    "base": ["#555555"],
    "full": ["#D55E00", "#E69F00", "#CC79A7"],
    "lora": ["#0072B2", "#56B4E9", "#009E73"],
}


def _styles(runs: list[RunResult]) -> dict[str, dict]:
    styles = {}
    used = dict.fromkeys(_COLOURS, 0)
    for run in runs:
        kind = run.config.method.name if run.is_continued else "base"
        colours = _COLOURS[kind]
        styles[run.config.name] = {
            "color": colours[used[kind] % len(colours)],
            "label": run.config.name,
        }
        used[kind] += 1
    return styles


def learning_forgetting(runs: list[RunResult]) -> Figure:
    """Draw held-out loss on new and old domains over tokens, and learned against forgotten.

    Each point is a milestone.
    """
    style = _styles(runs)
    continued = [run for run in runs if run.gains()]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for run in continued:
        for axis, domains in ((axes[0], run.learned_domains), (axes[1], run.old_domains)):
            for domain in domains:
                curve = run.curves[domain]
                axis.plot(
                    [tokens / 1e3 for tokens in curve],
                    list(curve.values()),
                    marker="o",
                    **style[run.config.name],
                )
        learned, forgotten = zip(*run.gains().values())
        axes[2].plot(forgotten, learned, marker="o", **style[run.config.name])
    if continued:
        axes[0].set_title(f"Learned: held-out {', '.join(continued[0].learned_domains)}")
        axes[1].set_title(f"Forgotten: held-out {', '.join(continued[0].old_domains)}")
    for axis in axes[:2]:
        axis.set(xlabel="thousand tokens", ylabel="bits per byte (lower is better)")
    axes[2].set_title("Learned against forgotten")
    axes[2].set(xlabel="forgotten (bits per byte lost)", ylabel="learned (bits per byte gained)")
    return _finish(figure, axes)


def training_loss(runs: list[RunResult]) -> Figure:
    """Draw the training loss and throughput of every run."""
    style = _styles(runs)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for run in runs:
        tokens = [record["tokens"] / 1e3 for record in run.metrics]
        # A step without a labelled token is a gap.
        losses = [record.get("loss", math.nan) for record in run.metrics]
        axes[0].plot(tokens, losses, **style[run.config.name])
        axes[1].plot(
            tokens,
            [record["tokens_per_second"] for record in run.metrics],
            **style[run.config.name],
        )
    axes[0].set(title="Training loss", xlabel="thousand tokens", ylabel="nats per token")
    axes[1].set(
        title="Throughput", xlabel="thousand tokens", ylabel="tokens per second", ylim=(0, None)
    )
    return _finish(figure, axes)


FIGURES: dict[str, Callable] = {
    "learning_forgetting": learning_forgetting,
    "training_loss": training_loss,
}


def _finish(figure: Figure, axes: Iterable[Axes]) -> Figure:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return figure
