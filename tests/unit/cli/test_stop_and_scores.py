import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phikit.base.errors import Interrupted
from phikit.cli.output import fresh
from phikit.cli.scores import scores, show_scores
from phikit.cli.stop import command, stoppable
from phikit.evals.task import EvalResult, ProblemRecord, ReplyRecord


def test_the_command_to_go_on_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/phikit", "run", "a", "--out", "my run"])
    with pytest.raises(Interrupted) as caught, stoppable(kept="all is kept"):
        raise KeyboardInterrupt
    assert str(caught.value).endswith("/opt/bin/phikit run a --out 'my run'")
    with pytest.raises(Interrupted, match="after step 3(.|\n)*go on with"), stoppable(kept=""):
        raise Interrupted("stopped after step 3")


def test_a_module_is_named_as_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/site/phikit/cli/__main__.py", "recipes"])
    assert command(["chat", "x"]) == f"{sys.executable} -m phikit.cli chat x"


@pytest.mark.parametrize(
    ("name", "on_ctrl_c"),
    [
        ("SIGINT", signal.default_int_handler),
        ("SIGTERM", signal.default_int_handler),
        ("SIGTERM", signal.SIG_IGN),  # as in a shell's background
    ],
)
def test_a_command_that_is_stopped_leaves_nothing_half_written(
    name: str, on_ctrl_c: Callable[..., object] | signal.Handlers, tmp_path: Path
):
    before = signal.getsignal(signal.SIGTERM)
    own = signal.signal(signal.SIGINT, on_ctrl_c)  # pyright: ignore[reportArgumentType]

    def write() -> None:
        with stoppable(kept="nothing is written"), fresh(tmp_path / "out") as place:
            place.write_text("half")
            signal.raise_signal(getattr(signal, name))
            pytest.fail("must have ended")

    try:
        with pytest.raises(Interrupted, match="stopped; nothing is written"):
            write()
    finally:
        signal.signal(signal.SIGINT, own)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def record(number: int, *statuses: str, steps: int | None = None) -> ProblemRecord:
    replies = tuple(
        ReplyRecord(status, "7" if status == "correct" else "8", None, 5, None, "")  # pyright: ignore
        for status in statuses
    )
    return ProblemRecord(str(number), "sums", steps, "?", "7", replies)


def test_several_replies_give_pass_and_majority(capsys: pytest.CaptureFixture[str]):
    records = (
        record(0, "correct", "wrong", "correct", steps=2),
        record(1, "wrong", "wrong", "correct", steps=3),
    )
    settings = {"num_samples": 3, "temperature": 0.6}
    numbers = scores(EvalResult("mine", records), settings)
    assert numbers["accuracy"] == numbers["avg@3"]["accuracy"] == pytest.approx(0.5)
    assert numbers["pass@1"]["accuracy"] == pytest.approx(0.5)
    assert numbers["pass@3"]["accuracy"] == 1.0
    assert numbers["maj@3"]["accuracy"] == 0.5
    assert [name for name in numbers if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@3"]
    show_scores(numbers)
    shown = capsys.readouterr().out
    assert "mine: 2 problems, 3 replies each" in shown and "correct 3   wrong 3" in shown
    assert "2 steps" in shown


def test_one_reply_is_just_an_accuracy(capsys: pytest.CaptureFixture[str]):
    numbers = scores(
        EvalResult("mine", (record(0, "correct"), record(1, "truncated"))),
        {"num_samples": 1, "temperature": 0.0},
    )
    assert not any("@" in name for name in numbers)
    show_scores(numbers)
    assert "50.0 ± 50.0 %" in capsys.readouterr().out
