"""The picture of a router: accuracy over the share of cloud calls, as a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phikit.evals.plots import LIGHT, STYLE, Palette, finish, legend, share_axis
from phikit.evals.routing import Case, Point, curve, oracle
from phikit.evals.stats import Z95


def routing_chart(
    signals: Mapping[str, Sequence[Case]], path: Path, *, chosen: Point | None = None
) -> None:
    """Draw a curve for each signal, with a 95 % band around the first.

    Args:
        signals: the same problems, judged with each signal of confidence.
        chosen: a threshold of the first signal, to be marked.
    """
    palette = LIGHT
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained", facecolor="white")
        axes = figure.subplots()
        first = next(iter(signals.values()))
        _draw_bounds(axes, first, palette)
        for number, (name, judged) in enumerate(signals.items()):
            _draw_curve(axes, name, judged, palette.series[1 + number], has_band=number == 0)
        if chosen is not None:
            axes.plot(chosen.share, chosen.accuracy.mean, "o", color=palette.ink, markersize=6)
        axes.set_title(f"Accuracy on {len(first)} problems")
        axes.set_xlabel("share of problems sent to the cloud", color=palette.muted)
        share_axis(axes.xaxis)
        share_axis(axes.yaxis)
        axes.set_xlim(0, 1)
        axes.margins(y=0.05)
        finish(axes, palette)
        legend(axes, palette)
        figure.savefig(path, dpi=200)


def _draw_bounds(axes: Axes, judged: Sequence[Case], palette: Palette) -> None:
    """Random routing and the oracle."""
    points = curve(judged)
    low = points[0].accuracy.mean if points[0].share == 0 else _mean(judged, "local")
    high = _mean(judged, "cloud")
    share, best = oracle(judged)
    axes.plot([0, 1], [low, high], "--", color=palette.series[0], label="random")
    axes.plot([0, share, 1], [low, best, best], ":", color=palette.series[0], label="oracle")


def _draw_curve(
    axes: Axes, name: str, judged: Sequence[Case], shade: str, *, has_band: bool
) -> None:
    points = curve(judged)
    shares = [point.share for point in points]
    values = [point.accuracy.mean for point in points]
    axes.plot(shares, values, color=shade, label=name.replace("_", " "), drawstyle="default")
    if has_band:
        halves = [Z95 * (point.accuracy.stderr or 0.0) for point in points]
        low = [value - half for value, half in zip(values, halves, strict=True)]
        high = [value + half for value, half in zip(values, halves, strict=True)]
        axes.fill_between(shares, low, high, color=shade, alpha=0.15, linewidth=0)


def _mean(judged: Sequence[Case], side: str) -> float:
    return sum(getattr(case, side) for case in judged) / len(judged)
