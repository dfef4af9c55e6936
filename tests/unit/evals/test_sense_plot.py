"""The chart of what is seen and heard, beside what the text model loses."""

from typing import Any

import pytest

from phikit.evals.media_report import senses_section
from phikit.evals.sense_plot import score, senses_svg


def stage(name: str, *, loss: float, is_same: bool, **senses: tuple[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "text": {"loss": loss},
        "is_text_same": is_same,
        "senses": {
            family: {"measure": measure, "value": value, "n": 4}
            for family, (measure, value) in senses.items()
        },
    }


STAGES = [
    stage("base", loss=2.0, is_same=True, text=("CER", 3.0), digit=("exact match", 0.0)),
    stage("see", loss=2.0, is_same=True),
    stage("vision3", loss=2.5, is_same=False, text=("CER", 0.25), digit=("exact match", 0.9)),
]


@pytest.mark.parametrize(
    ("measure", "value", "wanted"),
    [("CER", 0.25, 0.75), ("WER", 3.0, 0.0), ("exact match", 0.9, 0.9)],
)
def test_more_is_better(measure: str, value: float, wanted: float):
    assert score({"measure": measure, "value": value}) == wanted


def test_every_family_and_stage_is_named():
    drawn = senses_svg(STAGES)
    for name in ("digit", "text", "base", "see", "vision3", "nats a token"):
        assert name in drawn
    assert drawn == senses_svg(STAGES)
    assert drawn != senses_svg([STAGES[0], STAGES[1], {**STAGES[2], "is_text_same": True}])


def test_it_stands_in_the_report():
    assert "<svg" in senses_section({"stages": STAGES})
    assert "<svg" not in senses_section({"stages": STAGES[:1]})
