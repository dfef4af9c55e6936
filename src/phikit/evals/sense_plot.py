"""The picture of non-interference: what a model learns to see and hear, and what its text loses."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from phikit.evals.plots import Palette, finish, inline_svg, share_axis
from phikit.evals.senses import ERROR_RATES

DASHES = ("-", "--")
"""The lines of families take the colours in turn, once in each of these."""


def senses_svg(stages: Sequence[Mapping[str, Any]]) -> str:
    """Two charts over the stages of a results.json: the score of every family, and the text.

    An error rate is drawn as what it leaves of 1, at least 0. The text is drawn as the distance of
    its loss from that before the first of these stages; a stage after which logits and replies are
    the same bit for bit has a full dot, any other an empty one.

    Args:
        stages: those that a text model was compared after, in order.
    """
    names = [stage["name"] for stage in stages]
    families = dict.fromkeys(family for stage in stages for family in stage["senses"])

    def draw(figure: Figure, palette: Palette) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        colours = palette.series
        for number, family in enumerate(families):
            points = [
                (place, score(stage["senses"][family]))
                for place, stage in enumerate(stages)
                if family in stage["senses"]
            ]
            style = DASHES[number // len(colours) % len(DASHES)]
            above.plot(
                *zip(*points, strict=True),
                style,
                marker="o",
                markersize=3,
                color=colours[number % len(colours)],
                label=family,
            )
        above.set_title("Score of each family by stage")
        above.set_ylim(-0.03, 1.03)
        share_axis(above.yaxis)
        losses = [float(stage["text"]["loss"]) for stage in stages]
        drift = [loss - losses[0] for loss in losses]
        below.plot(range(len(drift)), drift, color=palette.ink)
        for place, stage in enumerate(stages):
            fill = palette.ink if stage["is_text_same"] else "none"
            below.plot(
                place, drift[place], "o", markersize=4, color=palette.ink, markerfacecolor=fill
            )
        below.set_title("Loss on text against before, nats a token")
        most = max(0.05, *map(abs, drift))
        below.set_ylim(-1.2 * most, 1.2 * most)
        below.set_xticks(range(len(names)), names)
        for axes in (above, below):
            finish(axes, palette)
        above.legend(loc="upper left", fontsize=7, frameon=False, labelcolor=palette.muted)

    return inline_svg(draw, "What it sees and hears, and its text, by stage", size=(8.6, 4.6))


def score(measured: Mapping[str, Any]) -> float:
    """From 0 to 1, more being better."""
    value = float(measured["value"])
    return max(0.0, 1 - value) if measured["measure"] in ERROR_RATES else value
