"""Pictures of runs: what came, what replicas there were, what waited, and how long answers took, on one time axis."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, here or in CI

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from cluster.simulate.replay import Run

# These differ in brightness too, for print and for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#666666", "#e69f00")
BIN_S = 2.0


def draw(runs: Sequence[Run], title: str, file: Path) -> None:
    """Write a picture of runs of the same load."""
    figure, axes = plt.subplots(4, sharex=True, figsize=(11, 11), layout="constrained")
    figure.suptitle(title)
    demand, count, queue, latency = axes
    load = runs[0].arrivals
    edges = np.arange(0.0, max(run.timeline.at_s[-1] for run in runs) + BIN_S, BIN_S)
    tokens, _ = np.histogram(load.at_s, edges, weights=load.tokens)
    demand.stairs(tokens / BIN_S / runs[0].rate, edges, color="black")
    demand.set_ylabel("load\n(full replicas)")
    for run, colour in zip(runs, COLOURS, strict=False):
        at_s = run.timeline.at_s
        count.step(at_s, run.timeline.target, where="post", color=colour, linewidth=1, linestyle=":")
        count.step(at_s, run.timeline.running, where="post", color=colour, label=run.name)
        queue.plot(at_s, np.array(run.timeline.waiting_tokens) / run.rate, color=colour)
        _latency(latency, run, edges, colour)
    count.set_ylabel("replicas running\n(dotted: wanted)")
    count.legend(loc="upper right")
    queue.set_ylabel("work that waits\n(s of one replica)")
    latency.set_ylabel("latency of what arrived then\n(ms; p50, and p99 bold)")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    latency.set_xlabel("seconds")
    for each in axes:
        each.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _latency(axes: Axes, run: Run, edges: np.ndarray, colour: str) -> None:
    place = np.digitize(run.arrivals.at_s, edges) - 1
    order = np.argsort(place, kind="stable")
    bins, starts = np.unique(place[order], return_index=True)
    groups = np.split(run.latency_s[order] * 1e3, starts[1:])
    for share, width in ((50, 0.8), (99, 2.0)):
        axes.plot(edges[bins], [np.percentile(group, share) for group in groups], color=colour, linewidth=width)


def draw_sweep(lines: dict[str, Sequence[Run]], title: str, file: Path) -> None:
    """Write a picture of cost against latency; a line for each kind of run, a point for each run."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for (name, runs), colour in zip(lines.items(), COLOURS, strict=False):
        hours = [run.replica_s / 3600 for run in runs]
        tails = [run.percentile_ms(99) for run in runs]
        axes.plot(hours, tails, marker="o", color=colour, label=name)
        for run, x, y in zip(runs, hours, tails, strict=True):
            axes.annotate(run.name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour)
    axes.set_title(title)
    axes.set_xlabel("replica-hours")
    axes.set_ylabel("p99 latency in ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)
