"""Which fonts, voices and palettes a split may use: decided by the hash of the name alone.

So a style belongs to one split whatever else is installed, and no seed can move it.
"""

from collections.abc import Iterable

import numpy as np

from phikit.base.errors import DataError
from phikit.data.split import Split, content_hash

TEST_SHARE, VALIDATION_SHARE = 0.25, 0.10
"""Larger than the shares of problems: there are few styles, and each split needs some."""

AS_IT_IS = 0.3
"""Share of training that shows its styles unaltered."""


def style_split(kind: str, name: str) -> Split:
    """The split of the style `name` of this kind; what is not held out is for training."""
    point = int(content_hash(f"{kind}:{name}")[:13], 16) / 16**13
    if point < TEST_SHARE:
        return "test"
    return "validation" if point < TEST_SHARE + VALIDATION_SHARE else "train"


def styles_of(split: Split, kind: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that problems of this split may show; reinforcement learning trains too.

    Raises DataError if there are none.
    """
    wanted = "train" if split == "rl" else split
    chosen = [name for name in names if style_split(kind, name) == wanted]
    if not chosen:
        raise DataError(
            f"no {kind} is left for the split {split!r}", fix="install more of them, or add some"
        )
    return chosen


def is_altered(random: np.random.Generator, split: Split) -> bool:
    """Whether to show a style altered: most of the time in training, where styles are few, and
    never where they are judged."""
    return split in ("train", "rl") and random.random() >= AS_IT_IS
