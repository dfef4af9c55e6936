"""Sources that read data sets of a hub, with rows in place of the hub."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from phikit.base.errors import DataError
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
