"""What a picture shows, and about where, as classes to learn: the labels of a dense task.

A picture that was drawn comes with marks (`canvas.Mark`). One sentence of answer says little about
a hundred tokens; the marks say what is to be named among them, in which order and by which tokens.
Every mark is named once, by one of the tokens that it reaches into: so what is named, read row by
row, is what is written. Which of them it is, is left to the encoder (`train.encoders`): the middle
of a letter of a strange font lies between two tokens as often as not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phikit.chat.image import Grid, ImageCrops, fit
from phikit.data.media.canvas import Mark

NOTHING = 0
"""The class of tokens that name nothing."""
BESIDE, ABOVE = 0.5, 0.3
"""A mark may be named so far beside its box, and in a row so far from its middle, in tokens."""


def mark_classes(pictures: Iterable[Sequence[Mark]]) -> dict[str, int]:
    """A number from 1 for every name that occurs."""
    names = sorted({mark.name for marks in pictures for mark in marks})
    return {name: number for number, name in enumerate(names, start=1)}


@dataclass(frozen=True, slots=True, eq=False)
class MarkedImage(ImageCrops):
    """An image, and the marks in its crops row by row; a token is 2 x 2 patches."""

    classes_U: NDArray[np.int64] = field(kw_only=True)
    places_UT: NDArray[np.bool_] = field(kw_only=True)
    """Which tokens may name each mark, counted row by row over all crops put together."""


def marked(
    image: ImageCrops,
    marks: Sequence[Mark],
    *,
    size: tuple[int, int],
    classes: Mapping[str, int],
) -> MarkedImage:
    """The image with its marks, each to be named in the row of tokens that holds its middle.

    Where the middle is near another row, that one will do as well. Marks side by side may be named
    by different tokens, however narrow they are, unless they are more than the tokens to the end of
    their row; the last ones are then left out.

    Args:
        image: the picture, cut into crops.
        marks: what is in it, in pixels of the picture.
        size: the picture's width and height.
        classes: of the marks' names; marks of other names are left out.
    """
    crop, tokens = image.pixels_MCHW.shape[-1], image.mask_MPP.shape[-1] // 2
    rows, columns = image.height_crops * tokens, image.width_crops * tokens
    shown = fit(*size, grid=Grid(image.width_crops, image.height_crops), crop_size=crop)
    per_x, per_y = (shown[k] / size[k] * tokens / crop for k in range(2))
    in_tokens = [
        Mark(m.name, m.left * per_x, m.top * per_y, m.right * per_x, m.bottom * per_y)
        for m in marks
        if m.name in classes
    ]
    named: list[int] = []
    places: list[NDArray[np.bool_]] = []
    last_row, free = -1, 0
    for mark in sorted(in_tokens, key=_reading_order):
        row, _ = _reading_order(mark)
        first = max(0, int(mark.left - BESIDE))
        earliest = max(first, free if row == last_row else 0)
        if earliest < columns:
            behind = max(math.ceil(mark.right + BESIDE), earliest + 1)
            middle = (mark.top + mark.bottom) / 2
            place = np.zeros((rows, columns), np.bool_)
            place[max(0, int(middle - ABOVE)) : int(middle + ABOVE) + 1, first:behind] = True
            named.append(classes[mark.name])
            places.append(place.ravel())
            last_row, free = row, earliest + 1
    return MarkedImage(
        image.pixels_MCHW,
        image.mask_MPP,
        image.height_crops,
        image.width_crops,
        image.overview,
        classes_U=np.array(named, np.int64),
        places_UT=np.array(places, np.bool_).reshape(-1, rows * columns),
    )


def _reading_order(mark: Mark) -> tuple[int, float]:
    """The row of tokens that holds its middle, and how far right it is there."""
    return int((mark.top + mark.bottom) / 2), (mark.left + mark.right) / 2
