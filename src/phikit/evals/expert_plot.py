"""Pictures of an `ExpertMap`: loads as small multiples, a layer each; losses by kind of token."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from phikit.evals.plots import Palette, finish, inline_svg, legend
from phikit.evals.results import Stage

PANEL = 2.1
"""Width of one layer's picture in inches."""
MAX_ACROSS = 4


def load_svg(stage: Stage, *, colour: int) -> str | None:
    """Shares of experts by kind of token, a panel for each layer; None for a dense model."""
    if stage.experts is None or not stage.experts.load:
        return None
    experts, title = stage.experts, f"Expert load by kind of token: {stage.name}"
    across = min(MAX_ACROSS, len(experts.load))
    down = -(-len(experts.load) // across)
    height = 0.55 + down * (0.55 + 0.24 * len(experts.kinds))

    def draw(figure: Figure, palette: Palette) -> None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=palette.ink, weight="bold")
        panels = figure.subplots(down, across, squeeze=False).flatten()
        shade = palette.series[1 + colour % (len(palette.series) - 1)]
        darkest = max(share for layer in experts.load for row in layer for share in row)
        for layer, (axes, load) in enumerate(zip(panels, experts.load, strict=False)):
            draw_load(axes, load, shade=shade, darkest=darkest)
            axes.set_title(f"layer {layer}", loc="left", color=palette.muted, fontsize=9)
            names = experts.kinds if layer % across == 0 else [""] * len(experts.kinds)
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(colors=palette.muted, length=0)
        for axes in panels[len(experts.load) :]:
            axes.set_visible(False)

    return inline_svg(draw, title, size=(1.1 + PANEL * across, height))


def draw_load(axes: Axes, load: Sequence[Sequence[float]], *, shade: str, darkest: float) -> None:
    """Cells [row][expert], the darker the larger; rectangles, as a bitmap could not change its
    colour with the page."""
    for row, shares in enumerate(load):
        for expert, share in enumerate(shares):
            opacity = min(1.0, share / darkest)
            axes.add_patch(
                Rectangle((expert - 0.46, row - 0.46), 0.92, 0.92, color=shade, alpha=opacity)
            )
    axes.set_xlim(-0.5, len(load[0]) - 0.5)
    axes.set_ylim(len(load) - 0.5, -0.5)
    axes.set_xticks(range(len(load[0])))
    axes.spines[:].set_visible(False)


def kinds_svg(stage: Stage, *, colour: int, beside: Stage | None) -> str | None:
    """Held-out loss by kind of token, beside that of the other model; None if not measured."""
    if stage.experts is None:
        return None
    experts, other = stage.experts, beside.experts if beside else None
    title = f"Held-out loss by kind of token: {stage.name}"

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_title(title)
        places = range(len(experts.kinds))
        shade = palette.series[1 + colour % (len(palette.series) - 1)]
        if other is not None and beside is not None:
            dots = dict(zip(other.kinds, other.losses, strict=True))
            values = [dots.get(kind, float("nan")) for kind in experts.kinds]
            name = f"{beside.name} ({other.loss:.3f} in all)"
            axes.plot(values, places, "o", color=palette.muted, label=name)
        name = f"{stage.name} ({experts.loss:.3f} in all)"
        axes.plot(experts.losses, places, "o", color=shade, label=name)
        axes.set_yticks(places, experts.kinds)
        axes.set_ylim(len(experts.kinds) - 0.4, -0.6)
        axes.set_xlim(left=0)
        finish(axes, palette)
        legend(axes, palette)

    return inline_svg(draw, title, size=(4.3, 2.75))
