"""The picture of a router: accuracy over the share of cloud calls, as a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phikit.evals.plots import LIGHT, STYLE, Palette, finish, legend, share_axis
from phikit.evals.stats import Z95


def routing_chart(
    signals: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    chosen: tuple[float, float] | None = None,
) -> None:
    """Draw a curve for each signal; the first has a 95 % band, random routing and the oracle.

    Args:
        signals: what `routing.to_dict` made of the same problems with each signal.
        chosen: a share and its accuracy, to be marked.
    """
    palette = LIGHT
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for number, (name, record) in enumerate(signals.items()):
            shade = palette.series[1 + number]
            if number == 0:
                _draw_bounds(axes, record, palette, shade)
            shares = [point["share"] for point in record["curve"]]
            values = [point["accuracy"] for point in record["curve"]]
            axes.plot(shares, values, color=shade, label=name.replace("_", " "))
        if chosen is not None:
            axes.plot(*chosen, "o", color=palette.ink, markersize=6)
        problems = next(iter(signals.values()))["problems"]
        axes.set_title(f"Accuracy on {problems} problems")
        axes.set_xlabel("share of problems sent to the cloud", color=palette.muted)
        share_axis(axes.xaxis)
        share_axis(axes.yaxis)
        axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        axes.set_xlim(0, 1)
        finish(axes, palette)
        legend(axes, palette)
        figure.savefig(path, dpi=200)


def _draw_bounds(axes: Axes, record: Mapping[str, Any], palette: Palette, shade: str) -> None:
    """Random routing, the oracle, and the band."""
    local, cloud, oracle = record["local"]["mean"], record["cloud"]["mean"], record["oracle"]
    best, grey = oracle["accuracy"], palette.series[0]
    axes.plot([0, 1], [local, cloud], "--", color=grey, label="random")
    axes.plot([0, oracle["share"], 1], [local, best, best], ":", color=grey, label="oracle")
    points = record["curve"]
    halves = [Z95 * (point["stderr"] or 0.0) for point in points]
    axes.fill_between(
        [point["share"] for point in points],
        [point["accuracy"] - half for point, half in zip(points, halves, strict=True)],
        [point["accuracy"] + half for point, half in zip(points, halves, strict=True)],
        color=shade,
        alpha=0.15,
        linewidth=0,
    )
