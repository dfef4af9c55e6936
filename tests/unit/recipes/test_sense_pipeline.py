"""Which families a stage trains on, and what chance is counted from."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from phikit.base.media import VISION
from phikit.base.progress import Progress
from phikit.data.media.parquet import write_parquet
from phikit.data.media.problem import MediaProblem
from phikit.data.problem import Provenance
from phikit.data.source import HubSource, MediaFileSource, MediaSource, Source
from phikit.data.split import split_of
from phikit.recipes.config import EvaluationConfig, MediaStage
from phikit.recipes.see_and_hear import see_modular
from phikit.recipes.sense_pipeline import DrawnProblems


def problem(family: str, number: int) -> MediaProblem:
    text, media = f"{family} {number}", {VISION: (b"never opened",)}
    origin = Provenance("album", family, "CC0-1.0", split_of(text), "test", "1", 0, number)
    return MediaProblem("<|image_1|>?", f"a{number % 3}", None, "", None, text, origin, media=media)


def drawn(source: Source, held_out: Source | None = None) -> tuple[DrawnProblems, MediaStage]:
    """The problems of a run with one stage on this source."""
    config = see_modular(backbone="nano")
    stage = config.stages[-1]
    assert isinstance(stage, MediaStage)
    stage = stage.model_copy(update={"source": source})
    evaluation = EvaluationConfig(
        source=held_out or MediaSource(families={"digit": 1}), max_new_tokens=4
    )
    changed = config.model_copy(update={"stages": (stage,), "evaluation": evaluation})
    return DrawnProblems(changed, Progress(console=Console(file=io.StringIO()))), stage


def test_problems_of_our_own_files_keep_their_families(tmp_path: Path):
    kinds = ("cats", "dogs")
    write_parquet([problem(kinds[k % 2], k) for k in range(60)], tmp_path / "x.parquet")
    source = MediaFileSource(layout="parquet", path=str(tmp_path))
    problems, stage = drawn(source, source)
    assert sorted(problems.families(stage)) == ["cats", "dogs"]
    answers = problems.answers(stage)
    for kind in kinds:
        of_kind = [p for p in problems[stage.name] if p.provenance.family == kind]
        assert answers[kind] == [(p.question, p.answer) for p in of_kind] and of_kind


def test_rows_of_the_hub_are_a_family(monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": f"word {k}", "image": b"never opened %d" % k} for k in range(40)]
    hub = SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = HubSource(
        id="someone/pictures", answer="text", media={VISION: "image"}, prompt="What is this?"
    )
    problems, stage = drawn(source, source)
    assert problems.families(stage) == ["someone/pictures"]
    [(family, pairs)] = problems.answers(stage).items()
    assert family == "someone/pictures" and len(pairs) == len(problems[stage.name])


def test_no_picture_is_drawn_to_count_answers():
    source = MediaSource(families={"digit": 10**12, "chart": 10**12})
    problems, stage = drawn(source)
    assert problems.families(stage) == ["digit", "chart"]
    assert {*problems.answers(stage)} == {"digit", "chart"}
