"""The figures of a report, as matplotlib draws them."""

from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from retemper.pipeline.report.results import RunResult

# Okabe and Ito's palette, distinguishable with any colour vision.
_COLOURS = {"base": "#555555", "full": "#D55E00", "lora": "#0072B2"}


def _style(run: RunResult) -> dict:
    colour = _COLOURS["base" if not run.is_continued else run.config.method.name]
    return {"color": colour, "label": run.config.name}


def learning_forgetting(runs: list[RunResult]):
    """Held-out loss on the new and the old domain over tokens, and one against the other; a point is a milestone."""
    continued = [run for run in runs if run.measures_forgetting]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for run in continued:
        for axis, domains in ((axes[0], [run.learned_domain]), (axes[1], run.old_domains)):
            for domain in domains:
                points = run.curves[domain]
                axis.plot([p.tokens / 1e3 for p in points], [p.bits_per_byte for p in points], marker="o", **_style(run))
        axes[2].plot(run.forgotten(), run.learned(), marker="o", **_style(run))
    if continued:
        axes[0].set_title(f"Learned: held-out {continued[0].learned_domain}")
        axes[1].set_title(f"Forgotten: held-out {', '.join(continued[0].old_domains)}")
    for axis in axes[:2]:
        axis.set(xlabel="thousand tokens", ylabel="bits per byte (lower is better)")
    axes[2].set_title("Learned against forgotten")
    axes[2].set(xlabel="forgotten (bits per byte lost)", ylabel="learned (bits per byte gained)")
    return _finish(figure, axes)


def training_loss(runs: list[RunResult]):
    """Training loss and throughput of every run."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for run in runs:
        tokens = [record["tokens"] / 1e3 for record in run.metrics]
        axes[0].plot(tokens, [record["loss"] for record in run.metrics], **_style(run))
        axes[1].plot(tokens, [record["tokens_per_second"] for record in run.metrics], **_style(run))
    axes[0].set(title="Training loss", xlabel="thousand tokens", ylabel="nats per token")
    axes[1].set(title="Throughput", xlabel="thousand tokens", ylabel="tokens per second", ylim=(0, None))
    return _finish(figure, axes)


FIGURES: dict[str, Callable] = {"learning_forgetting": learning_forgetting, "training_loss": training_loss}


def _finish(figure, axes):
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return figure
