"""The table of stages, for a terminal, for Markdown and for the HTML report: one set of cells.

Changes are paired differences against the stage before, in percentage points, with their 95 %
interval; where the interval covers zero the table says so in words.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from phikit.evals.results import Change, Results, Stage

COLUMNS = ("Stage", "Time", "Tokens", "Accuracy", "pass@1 (T = 0.6)", "Length", "Change")
NOTHING = "–"
MINUS = "−"


class Row(NamedTuple):
    """Formatted cells of one stage, in the order of `COLUMNS`."""

    stage: str
    time: str
    tokens: str
    accuracy: str
    pass_at_1: str
    length: str
    change: str


def stage_table(results: Mapping[str, Any]) -> Table:
    """The stages of a results.json as a rich table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for stage in Results.read(results).all_stages:
        # `Text` takes names literally; a plain string would be read as rich markup.
        table.add_row(*map(Text, stage_row(stage)))
    return table


def stage_table_markdown(results: Mapping[str, Any]) -> str:
    """The stages of a results.json as a Markdown table."""
    lines = [_markdown_line(COLUMNS), "|:--|" + "--:|" * (len(COLUMNS) - 1)]
    lines += [_markdown_line(stage_row(stage)) for stage in Results.read(results).all_stages]
    return "\n".join(lines) + "\n"


def stage_row(stage: Stage) -> Row:
    """The cells of one stage; a dash where nothing was measured."""
    return Row(
        stage=stage.name,
        time=_or_nothing(stage.seconds, duration),
        tokens=_or_nothing(stage.tokens, count),
        accuracy=accuracy(stage.accuracy, stage.stderr),
        pass_at_1=accuracy(stage.pass_at_1_t06, None),
        length=_or_nothing(stage.mean_tokens, lambda tokens: f"{tokens:.0f}"),
        change=_or_nothing(stage.paired, change),
    )


def accuracy(value: float | None, stderr: float | None) -> str:
    """`64.2 ± 1.5 %`, plus and minus one standard error."""
    if value is None:
        return NOTHING
    error = "" if stderr is None else f" ± {100 * stderr:.1f}"
    return f"{100 * value:.1f}{error} %"


def change(paired: Change) -> str:
    """`+12.4 [+9.8, +15.0]`, in points; says when that is within noise."""
    text = points(paired.delta)
    if paired.low is not None and paired.high is not None:
        text += f" [{points(paired.low)}, {points(paired.high)}]"
    return text + (" within noise" if paired.within_noise else "")


def points(share: float) -> str:
    """A difference of shares as signed percentage points."""
    rounded = round(100 * share, 1)
    return f"{MINUS if rounded < 0 else '+'}{abs(rounded):.1f}"


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `1 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float) -> str:
    """`950`, `12.3 k`, `4.6 M`, `1.2 B`."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # three digits would round up to it
            return f"{number / size:.3g} {suffix}"
    return f"{number:.0f}"


def _or_nothing(value: Any, form: Any) -> str:
    return NOTHING if value is None else form(value)


def _markdown_line(cells: tuple[str, ...]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
