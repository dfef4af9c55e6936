"""What synthetic reports speak of: findings, and the words for them.

The words are a closed vocabulary, in which every phrase means one thing; that is why such reports
can be read back exactly (`rules.read_report`). The medicine is a sketch of chest radiography, good
enough to test judges and no more.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Literal, NamedTuple, get_args

Side = Literal["left", "right", "both"]
Zone = Literal["upper", "middle", "lower", "apex"]
Change = Literal["new", "worse", "better", "same"]
"""Since an earlier study."""
SIDES: tuple[Side, ...] = get_args(Side)
ZONES: tuple[Zone, ...] = get_args(Zone)
CHANGES: tuple[Change, ...] = get_args(Change)

Grade = Literal[0, 1, 2, 3]
"""Of severity: minimal, mild, moderate, severe."""
GRADES: tuple[Grade, ...] = get_args(Grade)
SIZES: tuple[tuple[str, ...], ...] = (("trace", "tiny"), ("small",), ("moderate",), ("large",))
DEGREES: tuple[tuple[str, ...], ...] = (
    ("minimal", "subtle"),
    ("mild", "slight"),
    ("moderate",),
    ("severe", "marked"),
)
"""The words for each grade: of things with a size, and of others."""


class Place(NamedTuple):
    """Where a finding is; `zone` is None if only the side is told."""

    side: Side
    zone: Zone | None


class Finding(NamedTuple):
    """One finding; what is None is not told."""

    observation: str
    place: Place | None
    grade: Grade | None
    change: Change | None


class Observation(NamedTuple):
    """A thing that can be found."""

    names: tuple[str, ...]
    zones: tuple[Zone | None, ...] = ()
    """Where it may be; none for what has no side."""
    grades: tuple[tuple[str, ...], ...] | None = None
    """The words for how severe it is; None for what has no grades."""
    article: bool = True
    """Whether its names take one."""
    is_incidental: bool = False
    """It changes nothing for the patient: no error about it is significant."""


OBSERVATIONS: Mapping[str, Observation] = {
    "effusion": Observation(("pleural effusion",), (None,), SIZES),
    "pneumothorax": Observation(("pneumothorax",), (None, "apex"), SIZES),
    "consolidation": Observation(
        ("consolidation", "airspace opacification"), (*ZONES[:3], None), DEGREES, article=False
    ),
    "atelectasis": Observation(
        ("atelectasis", "volume loss"), ("middle", "lower"), DEGREES, article=False
    ),
    "oedema": Observation(("pulmonary oedema", "pulmonary edema"), (), DEGREES, article=False),
    "cardiomegaly": Observation(
        ("cardiomegaly", "enlargement of the heart"), (), DEGREES, article=False
    ),
    "nodule": Observation(("pulmonary nodule", "lung nodule"), ZONES),
    "granuloma": Observation(("calcified granuloma",), ZONES, SIZES, is_incidental=True),
    "scarring": Observation(
        ("linear scarring",), ("apex", "lower"), DEGREES, article=False, is_incidental=True
    ),
    "old_fracture": Observation(("healed rib fracture",), (None,), is_incidental=True),
    "aortic_calcification": Observation(
        ("aortic calcification",), (), DEGREES, article=False, is_incidental=True
    ),
}

CHANGE_PHRASES: Mapping[Change, tuple[str, ...]] = {
    "new": ("new since the prior study", "not present on the prior radiograph"),
    "worse": ("increased since the prior study", "worse than on the prior radiograph"),
    "better": ("decreased since the prior study", "improved from the prior radiograph"),
    "same": ("unchanged from the prior study", "stable since the prior radiograph"),
}
NORMAL_SENTENCES = (
    "The mediastinal contours are normal",
    "The visualised bones are intact",
    "The trachea is midline",
)


def places(observation: Observation) -> Iterator[Place | None]:
    """Where such a finding may be; None alone for what has no side."""
    if not observation.zones:
        yield None
    for side, zone in product(SIDES, observation.zones):
        yield Place(side, zone)


def place_phrases(place: Place) -> tuple[str, ...]:
    """The ways to say where something is."""
    side, zone = place
    if zone is None:
        both = ("on both sides", "bilaterally")
        return both if side == "both" else (f"on the {side}", f"in the {side} hemithorax")
    if zone == "apex":
        both = ("at both apices", "in both apical regions")
        one = (f"at the {side} apex", f"in the {side} apical region")
        return both if side == "both" else one
    if side == "both":
        return f"in both {zone} zones", f"in both {zone} thirds of the lungs"
    lobe = (f"in the {side} {zone} lobe",) if (side, zone) != ("left", "middle") else ()
    return f"in the {side} {zone} zone", f"in the {zone} third of the {side} lung", *lobe
