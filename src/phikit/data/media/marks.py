"""What a picture shows, and about where, as classes to learn: the labels of a dense task.

A picture that was drawn comes with marks (`canvas.Mark`). One sentence of answer says little about
a hundred tokens; the marks say what is to be named among them, in which order and by which tokens.
Every mark is named once, by one of the tokens that it reaches into: so what is named, read row by
row, is what is written. Which of them it is, is left to the encoder (`train.encoders`): the middle
of a letter of a strange font lies between two tokens as often as not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phikit.chat.image import Grid, ImageCrops, fit
from phikit.data.media.canvas import Mark

NOTHING = 0
"""The class of tokens that name nothing."""
SLACK = 0.5
"""A mark may be named so far beside its box, in tokens."""


def mark_classes(pictures: Iterable[Sequence[Mark]]) -> dict[str, int]:
    """A number from 1 for every name that occurs."""
    names = sorted({mark.name for marks in pictures for mark in marks})
    return {name: number for number, name in enumerate(names, start=1)}


@dataclass(frozen=True, slots=True, eq=False)
class MarkedImage(ImageCrops):
    """An image, and the marks in its crops row by row; a token is 2 x 2 patches."""

    classes_U: NDArray[np.int64]
    spans_U2: NDArray[np.int64]
    """The tokens that may name each mark, from the first up to, not including, the last, counted
    row by row over all crops put together."""


def marked(
    image: ImageCrops,
    marks: Sequence[Mark],
    *,
    size: tuple[int, int],
    classes: Mapping[str, int],
) -> MarkedImage:
    """The image with its marks: each in the row of tokens that holds its middle.

    Marks side by side may be named by different tokens, however narrow they are, unless they are
    more than the tokens to the end of their row; the last ones are then left out.

    Args:
        image: the picture, cut into crops.
        marks: what is in it, in pixels of the picture.
        size: the picture's width and height.
        classes: of the marks' names; marks of other names are left out.
    """
    rows, columns = image.height_crops, image.width_crops
    side, tokens = image.pixels_MCHW.shape[-1], image.mask_MPP.shape[-1] // 2
    shown = fit(*size, grid=Grid(columns, rows), crop_size=side)
    per_x, per_y = (shown[k] / size[k] * tokens / side for k in range(2))
    known = [mark for mark in marks if mark.name in classes]
    placed = sorted(
        (int((mark.top + mark.bottom) / 2 * per_y), (mark.left + mark.right) / 2 * per_x, mark)
        for mark in known
    )
    named: list[int] = []
    spans: list[tuple[int, int]] = []
    free = 0
    for row, _, mark in placed:
        begin, end = row * columns * tokens, (row + 1) * columns * tokens
        first = begin + max(0, int(mark.left * per_x - SLACK))
        earliest = max(first, free)
        if earliest < end:
            last = begin + int(np.ceil(mark.right * per_x + SLACK))
            named.append(classes[mark.name])
            spans.append((first, min(end, max(last, earliest + 1))))
            free = earliest + 1
    return MarkedImage(
        image.pixels_MCHW,
        image.mask_MPP,
        rows,
        columns,
        classes_U=np.array(named, np.int64),
        spans_U2=np.array(spans, np.int64).reshape(-1, 2),
    )
