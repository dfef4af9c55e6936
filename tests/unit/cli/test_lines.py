import pytest

from phikit.cli.lines import Interrupts, Joiner


@pytest.mark.parametrize(
    ("lines", "inputs"),
    [
        (["one", "two"], ["one", "two"]),
        (["on\\", "e", "two"], ["on\ne", "two"]),
        (['"""', "a", "", "b\\", '"""', "c"], ["a\n\nb\\", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a"""', "b"], ["a", "b"]),
        (['""" ""', '"""'], [' ""']),
        (['say """', "x"], ['say """', "x"]),
    ],
)
def test_lines_are_joined(lines: list[str], inputs: list[str]):
    joiner = Joiner()
    found = [text for text in map(joiner.push, lines) if text is not None]
    assert found == inputs
    assert not joiner.pending


def test_what_has_begun_can_be_forgotten():
    joiner = Joiner()
    assert joiner.push('"""a') is None and joiner.pending
    joiner.clear()
    assert joiner.push("b") == "b"


def test_only_two_quick_interrupts_are_two(monkeypatch: pytest.MonkeyPatch):
    moments = iter([0.0, 0.3, 10.0, 11.0])
    monkeypatch.setattr("phikit.cli.lines.time.monotonic", lambda: next(moments))
    interrupts = Interrupts()
    assert [interrupts.again() for _ in range(4)] == [False, True, False, False]
