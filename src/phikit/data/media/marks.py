"""What each patch of a picture shows, as classes to learn: the labels of a dense task.

A picture that was drawn comes with marks (`canvas.Mark`). One sentence of answer says little about
a hundred patches; the marks name what lies in every one of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phikit.chat.image import Grid, ImageCrops, fit, tiles
from phikit.data.media.canvas import Mark

IGNORED = -100
"""Of patches that are not asked about; cross-entropy leaves them out."""
NOTHING = 0
"""The class of patches without a mark."""


def mark_classes(pictures: Iterable[Sequence[Mark]]) -> dict[str, int]:
    """A number from 1 for every name that occurs."""
    names = sorted({mark.name for marks in pictures for mark in marks})
    return {name: number for number, name in enumerate(names, start=1)}


@dataclass(frozen=True, slots=True, eq=False)
class MarkedImage(ImageCrops):
    """An image, and the class of what each of its patches shows."""

    labels_MPP: NDArray[np.int64]


def marked(
    image: ImageCrops,
    marks: Sequence[Mark],
    *,
    size: tuple[int, int],
    classes: Mapping[str, int],
) -> MarkedImage:
    """The image with the class at the centre of each patch.

    The whole picture seen as one crop has labels only where it is not shrunk: what is then smaller
    than a patch could not be told.

    Args:
        image: the picture, cut into crops.
        marks: what is in it, in pixels of the picture.
        size: the picture's width and height.
        classes: of the marks' names; marks of other names are left out.
    """
    rows, columns = image.height_crops, image.width_crops
    side, patches = image.pixels_MCHW.shape[-1], image.mask_MPP.shape[-1]
    shown = fit(*size, grid=Grid(columns, rows), crop_size=side)
    per_x, per_y = (shown[k] / size[k] * patches / side for k in range(2))
    labels = np.full((rows * patches, columns * patches), NOTHING, np.int64)
    for mark in marks:
        if mark.name in classes:
            down = slice(_first_centre(mark.top * per_y), _first_centre(mark.bottom * per_y))
            across = slice(_first_centre(mark.left * per_x), _first_centre(mark.right * per_x))
            labels[down, across] = classes[mark.name]
    labels_MPP = tiles(labels[None], patches)[:, 0]
    is_shrunk = len(labels_MPP) > 1
    whole = np.full_like(labels_MPP[:1], IGNORED) if is_shrunk else labels_MPP
    return MarkedImage(
        image.pixels_MCHW,
        image.mask_MPP,
        rows,
        columns,
        labels_MPP=np.concatenate([whole, labels_MPP]),
    )


def _first_centre(edge: float) -> int:
    """The first patch whose centre does not lie before an edge, in units of patches."""
    return max(0, math.ceil(edge - 0.5))
