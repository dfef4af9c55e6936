"""Charts of a results.json: matplotlib figures, as inline SVG for the report and as a file.

What is unusual: one drawing serves light and dark. A figure is drawn with placeholder colours that
`to_svg` turns into CSS variables of the page around it. Text stays text, so a page's own typeface
applies. No pyplot: figures are plain objects, and nothing is global.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from phikit.evals.results import Results, Stage
from phikit.evals.stats import Z95, wilson

CURVES = {"loss": "Loss", "reward": "Reward", "length": "Reply length in tokens"}
"""Keys of metrics.jsonl that are drawn over the steps of a stage, and their titles."""
MAX_POINTS = 160
"""Longer curves are averaged into so many bins."""
_SIZE = (4.3, 2.75)


class Palette(NamedTuple):
    """Colours of a chart; stages take the `series` in turn."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Palette(
    ink="#1d2433",
    muted="#667085",
    grid="#e4e7ec",
    series=("#8792a6", "#2f7fd1", "#0c9a86", "#d97b1c", "#c43c6c", "#7656d6"),
)
DARK = Palette(
    ink="#e9edf5",
    muted="#98a2b3",
    grid="#2b3342",
    series=("#98a3b8", "#62aef5", "#31c6ae", "#f2a552", "#f07fa4", "#a78ef7"),
)
_CSS = Palette(
    ink="#000001",
    muted="#000002",
    grid="#000003",
    series=tuple(f"#0000a{i}" for i in range(len(LIGHT.series))),
)


def css_variables(palette: Palette) -> str:
    """The declarations that an SVG of `to_svg` expects on the page."""
    named = {"ink": palette.ink, "muted": palette.muted, "grid": palette.grid}
    named |= {f"s{i}": colour for i, colour in enumerate(palette.series)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def chart(results: Mapping[str, Any], path: Path, *, dark: bool = False) -> None:
    """Accuracy by stage and by difficulty of a results.json, side by side, as a PNG or SVG file.

    The background is transparent, so a dark page wants `dark`.
    """
    stages = Results.read(results).stages
    palette = DARK if dark else LIGHT
    with matplotlib.rc_context(STYLE), matplotlib.rc_context({"svg.fonttype": "path"}):
        figure = Figure(figsize=(2 * _SIZE[0], _SIZE[1]), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_accuracy(left, stages, palette)
        _draw_by_steps(right, stages, palette)
        for axes in (left, right):
            finish(axes, palette)
        figure.savefig(path, dpi=200, transparent=True, metadata=_undated(path))


def accuracy_svg(stages: Sequence[Stage]) -> str | None:
    """Accuracy by stage with 95 % intervals; None when no stage was evaluated."""
    if not any(stage.accuracy is not None for stage in stages):
        return None
    return _svg(lambda axes: _draw_accuracy(axes, stages, _CSS), "Accuracy by stage")


def steps_svg(stages: Sequence[Stage]) -> str | None:
    """Accuracy by number of reasoning steps, a line per stage."""
    if not any(stage.by_steps for stage in stages):
        return None
    return _svg(lambda axes: _draw_by_steps(axes, stages, _CSS), "Accuracy by difficulty")


def families_svg(stages: Sequence[Stage]) -> str | None:
    """Accuracy by family of problems, a dot per stage."""
    families = {family for stage in stages for family in stage.by_family}
    if not families:
        return None
    height = max(_SIZE[1], 1.2 + 0.26 * len(families))
    return _svg(
        lambda axes: _draw_by_family(axes, stages, _CSS), "Accuracy by family", height=height
    )


def curve_svg(stage: Stage, key: str, *, colour: int, beside: Stage | None = None) -> str | None:
    """One metric over the steps of one stage; None when the stage did not log it.

    Args:
        colour: number of the stage, which decides its colour on the page.
        beside: the same stage of another model, drawn in grey.
    """
    points, others = _points(stage, key), _points(beside, key) if beside else []
    if len(points) < 2:
        return None
    shade = _series(_CSS, colour)
    title = f"{CURVES[key]}: {_label(stage.name)}"

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        if beside is not None and len(others) > 1:
            _draw_curve(axes, others, _CSS.muted, name=beside.name)
        _draw_curve(axes, points, shade, name=stage.name)
        if len(others) > 1:
            legend(axes, _CSS)

    return _svg(draw, title)


def _points(stage: Stage, key: str) -> list[tuple[float, float]]:
    """Steps and values of a metric."""
    return [
        (float(row["step"]), float(row[key]))
        for row in stage.metrics
        if _is_finite(row.get("step")) and _is_finite(row.get(key))
    ]


def _draw_accuracy(axes: Axes, stages: Sequence[Stage], palette: Palette) -> None:
    axes.set_title("Accuracy by stage, 95 % interval")
    measured = [(i, s, s.accuracy) for i, s in enumerate(stages) if s.accuracy is not None]
    for place, (index, stage, value) in enumerate(measured):
        shade = _series(palette, index)
        low, high = _interval(value, stage.n, stage.stderr)
        axes.plot([low, high], [place, place], color=shade, linewidth=2.2, clip_on=False)
        axes.plot(value, place, "o", color=shade, markersize=6, clip_on=False)
        axes.annotate(
            f"{100 * value:.1f}",
            (high, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=palette.ink,
            fontweight="bold",
        )
    _name_rows(axes, [stage.name for _, stage, _ in measured])
    share_axis(axes.xaxis)
    axes.set_xlim(0, 1)


def _draw_by_steps(axes: Axes, stages: Sequence[Stage], palette: Palette) -> None:
    axes.set_title("Accuracy by reasoning steps")
    shown = [(i, stage) for i, stage in enumerate(stages) if stage.by_steps]
    for order, (index, stage) in enumerate(shown):
        shade = _series(palette, index)
        shift = 0.05 * (order - (len(shown) - 1) / 2)  # keeps the intervals apart
        cells = sorted(stage.by_steps.items(), key=lambda item: item[0])
        places = [steps + shift for steps, _ in cells]
        values = [cell.accuracy for _, cell in cells]
        axes.plot(
            places, values, "o-", color=shade, markersize=4, label=_label(stage.name), clip_on=False
        )
        for place, (_, cell) in zip(places, cells, strict=True):
            bounds = _interval(cell.accuracy, cell.n, cell.stderr)
            axes.plot([place, place], bounds, color=shade, linewidth=1, alpha=0.6, clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    share_axis(axes.yaxis)
    axes.set_ylim(0, 1)
    legend(axes, palette)


def _draw_by_family(axes: Axes, stages: Sequence[Stage], palette: Palette) -> None:
    axes.set_title("Accuracy by family")
    families = sorted({family for stage in stages for family in stage.by_family})
    for place, family in enumerate(families):
        cells = [(i, s.by_family[family]) for i, s in enumerate(stages) if family in s.by_family]
        values = [cell.accuracy for _, cell in cells]
        axes.plot([min(values), max(values)], [place, place], color=palette.grid, linewidth=3)
        for index, cell in cells:
            shade = _series(palette, index)
            axes.plot(cell.accuracy, place, "o", color=shade, markersize=6, clip_on=False)
    for index, stage in enumerate(stages):
        if stage.by_family:
            axes.plot([], [], "o", color=_series(palette, index), label=_label(stage.name))
    _name_rows(axes, families)
    share_axis(axes.xaxis)
    axes.set_xlim(0, 1)
    legend(axes, palette)


def _draw_curve(
    axes: Axes, points: Sequence[tuple[float, float]], shade: str, *, name: str
) -> None:
    """The values, thin, and their moving average."""
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    steps = [fmean(x for x, _ in part) for part in bins]
    means = [fmean(y for _, y in part) for part in bins]
    reach = len(bins) // 40
    smooth = [fmean(means[max(0, i - reach) : i + reach + 1]) for i in range(len(means))]
    axes.plot(steps, means, color=shade, linewidth=0.8, alpha=0.45)
    axes.plot(steps, smooth, color=shade, label=_label(name))


def _interval(value: float, n: int | None, stderr: float | None) -> tuple[float, float]:
    """The 95 % interval of a share: Wilson's, since the standard error is 0 at 0 % and 100 %."""
    if n:
        return wilson(round(value * n), n)
    half = 0.0 if stderr is None else Z95 * stderr
    return max(0.0, value - half), min(1.0, value + half)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def share_axis(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def legend(axes: Axes, palette: Palette) -> None:
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    for text in legend.get_texts():
        text.set_color(palette.muted)


def finish(axes: Axes, palette: Palette) -> None:
    """Colours and lines that all charts share."""
    axes.set_title(axes.get_title(), loc="left", color=palette.ink)
    axes.set_title("", loc="center")
    axes.grid(visible=True, axis="both", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette.muted, length=0, pad=6)
    axes.spines[:].set_visible(False)


STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "lines.linewidth": 1.6,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "phikit",
    "text.parse_math": False,  # a "$" in a name is a dollar
}


def _svg(draw: Callable[[Axes], None], title: str, *, height: float = _SIZE[1]) -> str:
    """Draw one chart and return it as an `<svg>` element in CSS variables."""

    def draw_alone(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        draw(axes)
        finish(axes, palette)

    return inline_svg(draw_alone, title, size=(_SIZE[0], height))


def inline_svg(
    draw: Callable[[Figure, Palette], None], title: str, *, size: tuple[float, float]
) -> str:
    """What `draw` makes of an empty figure, as an `<svg>` element in CSS variables.

    Args:
        size: of the figure in inches; the page scales it to its column.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, _CSS)
        file = io.StringIO()
        metadata = {"Date": None, "Title": title}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _inline(file.getvalue())


def _inline(document: str) -> str:
    """An SVG document as an element that scales with its column."""
    element = document[document.index("<svg") :]
    opening, rest = element.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening) + ' role="img"'
    colours = {_CSS.ink: "ink", _CSS.muted: "muted", _CSS.grid: "grid"}
    colours |= {shade: f"s{i}" for i, shade in enumerate(_CSS.series)}
    return re.sub(
        "|".join(colours), lambda match: f"var(--{colours[match.group()]})", f"{opening}>{rest}"
    )


def _undated(path: Path) -> dict[str, None] | None:
    return {"Date": None} if path.suffix == ".svg" else None


def _series(palette: Palette, index: int) -> str:
    return palette.series[index % len(palette.series)]


def _label(text: str, width: int = 22) -> str:
    shown = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
