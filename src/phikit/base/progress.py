"""Progress on a terminal, and sparse plain lines anywhere else.

A terminal gets a live bar with loss, speed and time left. A log file or a pipe gets one line every
`interval_s` seconds and one when a task ends, so that it stays readable.
"""

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console


class Progress:
    """Use as a context; call `task`, then `advance` as work gets done.

    Args:
        console: where to write; standard output by default.
        interval_s: seconds between plain lines when the console is no terminal.
    """

    def __init__(self, *, console: Console | None = None, interval_s: float = 10.0) -> None:
        self._console = console or Console()
        self._interval_s = interval_s
        self._bar = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[shown]}"),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
        self._bar_task: rich.progress.TaskID | None = None
        self._name, self._total, self._done, self._shown = "", 0, 0, ""
        self._started_s = self._printed_s = 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def task(self, name: str, total: int) -> None:
        """Begin a task of `total` units; it takes the place of the one before."""
        self._name, self._total, self._done, self._shown = name, total, 0, ""
        self._started_s = self._printed_s = time.monotonic()
        if self._bar is not None:
            self._bar_task = self._bar.add_task(name, total=total, shown="")

    def advance(self, count: int = 1, **fields: float | str) -> None:
        """Count `count` more units done and show `fields`, such as `loss`, `tokens_per_s`."""
        self._done += count
        if fields:
            self._shown = "  ".join(f"{_label(name)} {_short(x)}" for name, x in fields.items())
        if self._bar is not None:
            assert self._bar_task is not None, "advance() before task()"
            self._bar.update(self._bar_task, advance=count, shown=self._shown)
            return
        now_s = time.monotonic()
        if self._done >= self._total or now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            self._print_line(now_s - self._started_s)

    def print(self, text: str) -> None:
        """Print a line above the bar. The text is shown as it is, never read as rich markup."""
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _print_line(self, elapsed_s: float) -> None:
        left_s = elapsed_s / max(self._done, 1) * max(self._total - self._done, 0)
        clock = f"elapsed {_clock(elapsed_s)}  left {_clock(left_s)}"
        parts = [self._name, f"{self._done}/{self._total}", self._shown, clock]
        self.print("  ".join(part for part in parts if part))


def _label(name: str) -> str:
    return name.replace("_per_", "/").replace("_", " ")


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
