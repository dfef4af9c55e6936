"""`phikit judge`: what is wrong in generated reports, type by type."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from phikit.base.errors import ConfigError
from phikit.base.files import write_atomic
from phikit.cli.screen import screen
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    from phikit.evals.factuality.judgement import Factuality, Judge

BY_RULES = "rules"

File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE.JSONL", help='Rows of {"reference", "candidate"}.'),
]
By = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="The config of an endpoint (docs/factuality.md), or rules, which read the synthetic "
        "reports alone.",
    ),
]
Planted = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Judge N synthetic reports with planted errors in place of a file, and tell how near "
        "the judge comes.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of the synthetic reports.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="For the figures and every judgement, as JSON.")
]


def judge(
    file: File = None,
    by: By = BY_RULES,
    planted: Planted = None,
    seed: Seed = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Count the errors of generated radiology reports against their references.

    Six types, each clinically significant or not, after CheXprompt. A judgement that fails counts
    as no judgement, never as a report without errors. Not for clinical use.
    """
    from phikit.evals.factuality.judgement import agreement, judge_reports, read_pairs
    from phikit.evals.factuality.synthetic import planted as plant

    if (file is None) == (planted is None):
        raise ConfigError("give one set of reports", fix="either FILE.jsonl or --planted N")
    with stoppable(kept="judging keeps nothing until it is done"):
        known = plant(seed=seed, count=planted) if planted is not None else []
        pairs = [each.pair for each in known] if file is None else read_pairs(file)
        with _judge(by, len(pairs)) as judge:
            result = judge_reports(pairs, judge)
    record = result.to_dict()
    if known:
        truth = agreement(result, [each.errors for each in known])
        record["summary"]["agreement"] = truth
    if out is not None:
        write_atomic(out, json.dumps(record, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(record["summary"], indent=1))
    else:
        _tell(result, record["summary"])


@contextmanager
def _judge(by: str, count: int) -> "Iterator[Judge]":
    from rich.console import Console

    from phikit.base.progress import Progress
    from phikit.evals.factuality.model_judge import JudgeConfig, model_judge
    from phikit.evals.factuality.rules import RULES
    from phikit.generate.remote import Remote

    if by == BY_RULES:
        yield RULES
        return
    config = JudgeConfig.read(Path(by), fix="see docs/factuality.md")
    with Remote(config.endpoint) as chat, Progress(console=Console(stderr=True)) as progress:
        progress.task(config.endpoint.model, count)
        yield model_judge(
            chat,
            config.options(),
            name=config.endpoint.model,
            examples=config.examples,
            at_once=config.endpoint.max_concurrent,
            on_progress=progress.advance,
        )
    spent = chat.spent
    typer.echo(
        f"{spent.calls} calls, {spent.prompt_tokens} + {spent.reply_tokens} tokens, "
        f"cost {spent.cost:.4f}",
        err=True,
    )


def _tell(result: "Factuality", summary: dict[str, Any]) -> None:
    nulls = summary["n"] - summary["judged"]
    typer.echo(f"{summary['n']} reports, judged by {summary['judge']}")
    typer.echo(f"null judgements: {nulls}, {_percent(summary['null_rate'])}")
    if nulls:
        reason = next(each.reason for each in result.judgements if each.errors is None)
        typer.echo(f"the first: {reason}")
    if summary["judged"] == 0:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("errors", "significant", "insignificant"):
        table.add_column(column, justify="left" if column == "errors" else "right")
    for name, counts in summary["errors"].items():
        cells = (str(counts[weight]) for weight in ("significant", "insignificant"))
        table.add_row(name.replace("_", " "), *cells)
    screen().print(table)
    typer.echo(f"over {summary['judged']} judged reports:")
    typer.echo(f"errors per report: {_mean(summary['errors_per_report'])}")
    typer.echo(f"significant errors per report: {_mean(summary['significant_errors_per_report'])}")
    typer.echo(f"without a significant error: {_percent(summary['without_significant_error'])}")
    typer.echo(f"without any error: {_percent(summary['without_error'])}")
    if truth := summary.get("agreement"):
        typer.echo(f"exactly the planted errors: {_percent(truth['exactly_right'])}")
        typer.echo(f"mean difference in errors per report: {truth['mean_difference']:.2f}")


def _mean(figure: dict[str, float | None]) -> str:
    interval = "" if figure["low"] is None else f" [{figure['low']:.2f}, {figure['high']:.2f}]"
    return f"{figure['mean']:.2f}{interval}"


def _percent(figure: dict[str, float]) -> str:
    low, share, high = (100 * figure[key] for key in ("low", "share", "high"))
    return f"{share:.1f} % [{low:.1f}, {high:.1f}]"
