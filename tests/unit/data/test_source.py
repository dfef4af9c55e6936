"""Sources that read data sets of a hub, with rows in place of the hub."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from phikit.base.errors import DataError
from phikit.data.media.problem import MediaProblem, Stored
from phikit.data.source import HubSource, load_problems
from phikit.data.split import split_of

TRACE = "<think>\n3 + 4 = 7\n</think>\n\\boxed{7}"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub's data set holds."""
    given: list[dict[str, Any]] = []
    hub = SimpleNamespace(load_dataset=lambda *_, **__: iter(given))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return given


def source(**changes: Any) -> HubSource:
    return HubSource(id="someone/set", **changes)


def test_a_reply_among_turns_is_the_assistants_last(rows):
    for number in range(40):
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "first"},
            {"role": "assistant", "content": TRACE},
        ]
        rows.append({"question": f"What is 3 + 4, time {number}?", "answer": "7", "turns": turns})
    found = load_problems(source(solution="turns", count=5), split="train", seed=0)
    assert len(found) == 5
    for problem in found:
        assert (problem.thinking, problem.solution) == ("3 + 4 = 7", "\\boxed{7}")
        assert split_of(problem.signature) == problem.provenance.split == "train"


def test_all_rows_of_a_benchmark_are_test_problems(rows):
    rows += [{"question": f"Question {number}?", "answer": "1"} for number in range(30)]
    found = load_problems(source(is_benchmark=True), split="test", seed=0)
    assert len(found) == 30
    assert {problem.provenance.split for problem in found} == {"test"}
    with pytest.raises(DataError, match="is a benchmark.*'train'"):
        load_problems(source(is_benchmark=True), split="train", seed=0)


@pytest.mark.parametrize("turns", [None, [], [{"role": "user", "content": "?"}], 5])
def test_rows_without_the_named_columns_are_refused(rows, turns):
    rows.append({"question": "What?", "answer": "7", "turns": turns})
    with pytest.raises(DataError, match=r"row 0: no text in the columns \['turns'\]"):
        load_problems(source(solution="turns"), split="train", seed=0)


def test_media_of_the_hub_are_left_undecoded(monkeypatch: pytest.MonkeyPatch):
    """By the library itself, from pictures and sounds as it stores them."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        question=datasets.Value("string"), answer=datasets.Value("string"),
        image=datasets.Image(), sounds=datasets.List(datasets.Audio()),
    )  # fmt: skip
    picture, sound = {"bytes": b"picture", "path": None}, {"bytes": b"sound", "path": None}
    columns = {
        "question": ["What?"], "answer": ["A cat."], "image": [picture], "sounds": [[sound, sound]]
    }  # fmt: skip
    table = datasets.Dataset.from_dict(columns).cast(features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    media = {"vision": "image", "speech": "sounds"}
    [found] = load_problems(source(media=media, is_benchmark=True), split="test", seed=0)
    assert isinstance(found, MediaProblem)
    assert found.question == "<|image_1|><|audio_1|><|audio_2|>What?"
    loaded = {
        name: [each.load() for each in of if isinstance(each, Stored)]
        for name, of in found.media.items()
    }
    assert loaded == {"vision": [b"picture"], "speech": [b"sound", b"sound"]}
    assert found.provenance.source == "someone/set"


def test_a_file_of_the_hub_is_fetched_when_it_is_needed(rows, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Hub(MemoryFileSystem):
        protocol = "hf"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("hf://", "memory://"))

    monkeypatch.setitem(_registry, "hf", Hub)
    Hub().pipe_file("hf://datasets/a/x.png", b"picture")
    for path in ("hf://datasets/a/x.png", "hf://datasets/a/gone.png", "file:///etc/passwd"):
        rows.append({"image": {"path": path, "bytes": None}, "answer": "A cat."})
    found = load_problems(
        source(media={"vision": "image"}, prompt="What?", is_benchmark=True), split="test", seed=0
    )
    items = [i for p in found if isinstance(p, MediaProblem) for i in p.media["vision"]]
    here, gone, outside = (item for item in items if isinstance(item, Stored))
    assert here.load() == b"picture"
    with pytest.raises(DataError, match="cannot fetch hf://datasets/a/gone.png"):
        gone.load()
    with pytest.raises(DataError, match="neither bytes nor a file"):
        outside.load()
