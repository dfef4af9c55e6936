import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from phikit.base.errors import ConfigError, RunError
from phikit.base.metrics import MetricsLog, open_trackers
from phikit.base.progress import Progress


def test_log_round_trip(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.write(1, {"loss": 1.5, "phase": "sft"})
    log.write(2, {"loss": float("nan")})
    assert log.read() == [{"step": 1, "loss": 1.5, "phase": "sft"}, {"step": 2, "loss": "nan"}]


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 3})
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in log.read()] == [1, 2, 3, 4, 5]
    log.truncate(3)
    log.write(4, {"loss": 4 / 3})
    log.write(5, {"loss": 5 / 3})
    assert log.path.read_text() == whole


def test_damage_in_the_middle_is_an_error(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"step": 1}\ngarbage\n{"step": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        log.read()


def test_unknown_tracker(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'"):
        open_trackers(["tensorbord"], run_path=tmp_path, config={})
    assert open_trackers([], run_path=tmp_path, config={}) == []


def test_tensorboard_tracker_writes_events(tmp_path: Path):
    pytest.importorskip("tensorboard")
    [tracker] = open_trackers(["tensorboard"], run_path=tmp_path, config={"a": 1})
    tracker.write(1, {"loss": 1.0, "note": "text is not plotted"})
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_plain_progress_is_sparse_and_reports_the_end():
    out = io.StringIO()
    with Progress(console=Console(file=out), interval_s=1000) as progress:
        progress.task("sft", 100)
        for _ in range(100):
            progress.advance(loss=1.23456, tokens_per_s=5123.4)
        progress.print("[not markup]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("sft  100/100  loss 1.235  tokens/s 5,123  elapsed 0:")
    assert lines[1] == "[not markup]"


def test_terminal_progress_shows_fields():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(console=console) as progress:
        progress.task("rl", 2)
        progress.advance(reward=0.5)
        progress.advance(reward=0.75)
    assert "reward 0.75" in out.getvalue()


def test_log_lines_are_json(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, {"loss": float("inf")})
    assert json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))
