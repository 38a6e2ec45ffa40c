"""The picture of a report: throughput and tail over connections, and the ratios to the better peer."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, here or in CI

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from loadtest.report import INFINITY, OURS, RAW, Results
from loadtest.summary import ratio_to_best

SHAPES = (("9w", "9 words"), ("64w", "64 words"), ("510w", "510 words"))
# One colour a system wherever it stands; they differ in brightness too, for print and for the colour-blind.
COLOURS = {
    OURS: "#0072b2",
    "infinity-onnx": "#d55e00",
    "infinity-torch": "#e69f00",
    "plain-serve": "#666666",
    RAW: "#aaaaaa",
}


def draw(results: Results, file: Path) -> None:
    """Write the picture: two panels for each length that was measured at several connections, and the ratios."""
    shapes = [
        (shape, said)
        for shape, said in SHAPES
        if any(len(results.growth(system, shape, "requests_per_s")) > 1 for system in results.systems)
    ]
    rows = [[f"{kind} {shape}" for shape, _ in shapes] + ["ratio"] for kind in ("rate", "p99")]
    figure, axes = plt.subplot_mosaic(rows, figsize=(5.5 * len(shapes) + 5, 8.5), layout="constrained")
    for shape, said in shapes:
        _lines(axes[f"rate {shape}"], results, shape, "requests_per_s", f"{said}: requests/s")
        _lines(axes[f"p99 {shape}"], results, shape, "p99_ms", f"{said}: p99 in ms")
    _bars(axes["ratio"], results)
    machine = results.run["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if "gpu" in machine else "")
    figure.suptitle(f"{where}, {results.run['date']}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _lines(axes: Axes, results: Results, shape: str, field: str, title: str) -> None:
    connections: set[int] = set()
    for system in results.systems:
        # A 0 is what no request was answered of; it has no place on a logarithmic axis.
        growth = {at: value for at, value in results.growth(system, shape, field).items() if value > 0}
        # The latency of a batch is no answer's latency.
        if not growth or (system == RAW and field == "p99_ms"):
            continue
        connections |= growth.keys()
        style = {"linestyle": "--"} if system == RAW else {"marker": "o"}
        axes.plot(list(growth), list(growth.values()), label=system, color=COLOURS[system], **style)
    axes.set_title(title)
    axes.set_xlabel("connections")
    if not connections:
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(connections))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    # Half a decade may be all that a plot spans, too little for powers of ten alone.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")


def _bars(axes: Axes, results: Results) -> None:
    rates = {system: results.medians(system, "requests_per_s") for system in results.systems}
    ratios = ratio_to_best(rates.get(OURS, {}), [rates[name] for name in INFINITY if name in rates])
    names = list(ratios)[::-1]
    bars = axes.barh(names, [ratios[name] for name in names], color=COLOURS[OURS])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)
    axes.set_title("requests/s over the better Infinity")
