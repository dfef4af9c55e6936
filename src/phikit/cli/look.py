"""`phikit report`, `diff` and `recipes`: look at what is there; nothing is trained or sampled."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import RunError
from phikit.cli.locate import complete_run, finished_stages, locate_pipeline, stage_name
from phikit.cli.settings import leaves, own_settings

if TYPE_CHECKING:
    from phikit.evals.task import EvalResult

RUN_FOLDER = "A run folder that `phikit run` wrote."


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help=RUN_FOLDER, autocompletion=complete_run)
    ],
) -> None:
    """Write report.html anew from what the folder holds, and print the table of stages."""
    from phikit.cli.screen import screen
    from phikit.evals.report import write_report
    from phikit.evals.table import stage_table

    path, _ = locate_pipeline(run)
    results = _results(path)
    write_report(results, path / "report.html")
    screen().print(stage_table(results))
    typer.echo(f"\nreport: {path / 'report.html'}")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=RUN_FOLDER, autocompletion=complete_run)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.", autocompletion=complete_run)],
) -> None:
    """Compare two runs: their settings, and the accuracy of stages on the same problems."""
    from rich.table import Table
    from rich.text import Text

    from phikit.base.config import differences
    from phikit.cli.screen import screen

    (path_a, record_a), (path_b, record_b) = locate_pipeline(a), locate_pipeline(b)
    console = screen()
    changes = differences(dict(leaves(record_a["config"])), dict(leaves(record_b["config"])))
    settings = Table("Setting", "A", "B", box=None, pad_edge=False, header_style="bold")
    for change in changes:
        settings.add_row(*map(Text, (change.path, _short(change.a), _short(change.b))))
    console.print(settings if changes else "The settings are the same.")
    console.print()
    results = Table("Stage", "A", "B", "B minus A", box=None, pad_edge=False, header_style="bold")
    for row in _compared(_evaluations(path_a, record_a), _evaluations(path_b, record_b)):
        results.add_row(*map(Text, row))
    console.print(results if results.row_count else "No stage is finished in both.")


def recipes() -> None:
    """List the recipes."""
    from rich.table import Table

    from phikit.cli.screen import screen
    from phikit.recipes import PIPELINES

    table = Table("Recipe", "What", "Stages", box=None, pad_edge=False, header_style="bold")
    for name, recipe in PIPELINES.items():
        what = (recipe.__doc__ or "").strip().partition("\n")[0]
        what = "\n".join([what, *(f"  --set {each}" for each in own_settings(name))])
        table.add_row(name, what, " ".join(stage.name for stage in recipe().stages))
    screen().print(table)


def _results(path: Path) -> dict[str, Any]:
    file = path / "results.json"
    if not file.is_file():
        raise RunError(
            f"{path} has no results yet: looked for {file}",
            fix="finish a stage first, with the `phikit run` that began it",
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is not JSON: {error}", fix="run the pipeline again") from error


def _evaluations(path: Path, record: dict[str, Any]) -> "dict[str, EvalResult]":
    """The greedy evaluation of the base and of each finished stage, by name."""
    from phikit.base.config import fingerprint
    from phikit.evals.task import EvalResult

    file = f"evaluation-{fingerprint(record['config']['evaluation'])[:8]}.json"
    folders = {stage_name(folder): folder for folder in finished_stages(path, record)}
    kept = {name: folder / file for name, folder in {"base": path / "base", **folders}.items()}
    found = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in kept.items()
        if file.is_file()
    }
    return {
        name: EvalResult.from_dict(of["greedy"]) for name, of in found.items() if "greedy" in of
    }


def _compared(
    a: "dict[str, EvalResult]", b: "dict[str, EvalResult]"
) -> list[tuple[str, str, str, str]]:
    """A row per stage that both have: the two accuracies, and their paired difference."""
    from phikit.base.errors import DataError
    from phikit.evals.results import Change
    from phikit.evals.stats import paired_difference
    from phikit.evals.table import accuracy, change

    rows = []
    for name in a.keys() & b.keys():
        try:
            pair = paired_difference(a[name].scores(), b[name].scores())
            difference = change(Change.model_validate(pair._asdict()))
        except DataError:
            difference = "not the same problems"
        shares = [accuracy(r.accuracy.mean, r.accuracy.stderr) for r in (a[name], b[name])]
        rows.append((name, *shares, difference))
    order = list(a)
    return sorted(rows, key=lambda row: order.index(row[0]))


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:59]}…"
