"""Pictures of a claim's record: differences as a forest, curves over steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from experiments.grin.claim import T95
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phikit.evals.plots import Palette, finish, legend

Draw = Callable[[Figure, Palette, Mapping[str, Any]], None]
MAX_CURVES = 5


def arms_and_differences(control: str | None) -> Draw:
    """The claim's comparisons; and the arms over steps, less the control if there is one."""

    def draw(figure: Figure, palette: Palette, record: Mapping[str, Any]) -> None:
        left, right = figure.subplots(1, 2)
        forest(left, palette, record["verdict"]["comparisons"])
        curves(right, palette, record["runs"], control)
        for axes in (left, right):
            finish(axes, palette)
        legend(right, palette)

    return draw


def forest(axes: Axes, palette: Palette, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """A line for each difference with its interval; those of the deciding measure first."""
    for place, found in enumerate(comparisons):
        is_clear = found["low"] > 0 or found["high"] < 0
        shade = palette.series[1] if is_clear else palette.muted
        axes.plot([found["low"], found["high"]], [place, place], color=shade, linewidth=2)
        axes.plot(found["delta"], place, "o", color=shade, markersize=5)
    axes.axvline(0, color=palette.muted, linewidth=1)
    axes.set_yticks(range(len(comparisons)), [found["name"] for found in comparisons])
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.set_title("Differences, 95 % intervals")


def curves(
    axes: Axes,
    palette: Palette,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    control: str | None,
) -> None:
    """Held-out loss on the way: with a control the mean difference from it and its interval."""
    shown = [arm for arm in runs if arm != control][:MAX_CURVES]
    for number, arm in enumerate(shown):
        shade = palette.series[1 + number % (len(palette.series) - 1)]
        steps = [step for step, _ in runs[arm][0]["curve"]]
        if control is None:
            axes.plot(steps, _means(_losses(runs[arm])), color=shade, label=arm)
            continue
        pairs = zip(_losses(runs[arm]), _losses(runs[control]), strict=True)
        differences = [[a - b for a, b in zip(x, y, strict=True)] for x, y in pairs]
        means = _means(differences)
        halves = [_half(values) for values in zip(*differences, strict=True)]
        axes.plot(steps, means, color=shade, label=arm)
        bounds = [[m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1)]
        axes.fill_between(steps, *bounds, color=shade, alpha=0.15, linewidth=0)
    axes.set_title(f"Loss − {control}, by step" if control else "Held-out loss, by step")


def _losses(runs: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    return [[loss for _, loss in run["curve"]] for run in runs]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in zip(*rows, strict=True)]


def _half(values: Sequence[float]) -> float:
    return T95[len(values) - 2] * stdev(values) / math.sqrt(len(values))
