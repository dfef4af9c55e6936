"""`phikit eval --router`: what each threshold of a router would cost, and what it would gain."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from phikit.base.errors import ConfigError
from phikit.cli.screen import screen

if TYPE_CHECKING:
    from phikit.data.problem import Problem
    from phikit.evals.routing import Case, Point
    from phikit.evals.scorer import Scorer
    from phikit.serve.budget import Metered
    from phikit.serve.router import RouterConfig
    from phikit.solve.solver import Reply
    from phikit.weights.load import Loaded

ROWS = 11
"""Of the table: shares of 0, 10, ... 100 % or the nearest below."""


def evaluate_router(
    path: Path,
    problems: "list[Problem]",
    loaded: "Loaded",
    *,
    max_new_tokens: int,
    scorer: "Scorer",
    out: Path,
    as_json: bool,
) -> None:
    """Answer every problem on both sides, and sweep the threshold over what came of it.

    Raises:
        ConfigError: the config has no cloud, or no signal that can be measured.
        BudgetError: the budget of the config does not allow a call for each problem.
    """
    from phikit.evals.routing import cases, to_dict
    from phikit.evals.routing_plot import routing_chart
    from phikit.serve.hybrid import open_cloud, read_router_config
    from phikit.serve.router import boxed_or_whole
    from phikit.solve.confidence import SIGNALS

    config = read_router_config(path)
    cloud, policy = open_cloud(config), config.confidence
    if cloud is None or policy is None or policy.signal not in SIGNALS:
        raise ConfigError(
            f"{path} has nothing to sweep",
            fix="give it a [cloud], and [confidence] with a signal: " + ", ".join(SIGNALS),
        )
    here, there = _ask_both(config, problems, loaded, cloud, max_new_tokens)
    judged = cases(
        problems,
        here,
        there,
        scorer=scorer,
        signal=SIGNALS[policy.signal],
        answer_of=boxed_or_whole,
    )
    spent = cloud.remote.spent
    price = spent.cost / max(1, spent.calls)
    record = {
        "signal": policy.signal,
        "threshold": policy.threshold,
        "spent": spent._asdict(),
        **to_dict(judged, cost_per_call=price),
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture = out.with_suffix(".png")
    routing_chart({policy.signal: record}, picture)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        _tell(judged, policy.threshold, price)
        typer.echo(f"curve: {out} and {picture}", err=True)


def _ask_both(
    config: "RouterConfig",
    problems: "Sequence[Problem]",
    loaded: "Loaded",
    cloud: "Metered",
    max_new_tokens: int,
) -> "tuple[list[list[Reply]], list[list[Reply]]]":
    from rich.console import Console

    from phikit.base.progress import Progress
    from phikit.generate.chat import ChatOptions
    from phikit.generate.engine import Engine
    from phikit.serve.router import sampling
    from phikit.solve.asked import asked
    from phikit.solve.plain import SamplingConfig, plain

    assert config.cloud is not None
    options = ChatOptions(max_new_tokens=max_new_tokens)
    local = sampling(config, options)
    drawn = SamplingConfig(
        max_new_tokens=max_new_tokens,
        num_samples=local.num_samples,
        temperature=local.temperature,
    )
    with Progress(console=Console(stderr=True)) as progress:
        progress.task("local", len(problems) * drawn.num_samples)
        here = plain(
            Engine(loaded.model),
            loaded.renderer,
            drawn,
            on_progress=lambda _, finished: progress.advance(finished),
        )(problems)
        progress.task("cloud", len(problems))
        there = asked(
            cloud, options, at_once=config.cloud.max_concurrent, on_progress=progress.advance
        )(problems)
    return here, there


def _tell(judged: "Sequence[Case]", threshold: float, price: float) -> None:
    from phikit.evals.routing import at, curve, oracle

    points = curve(judged, cost_per_call=price)
    shares = [i / (ROWS - 1) for i in range(ROWS)]
    rows = {max(p for p in points if p.share <= max(share, points[0].share)) for share in shares}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("threshold", "to the cloud", "accuracy", "of the gap", "cost per problem"):
        table.add_column(name, justify="right")
    for point in sorted(rows):
        table.add_row(*_row(point))
    screen().print(table)
    share, best = oracle(judged)
    configured = "   ".join(_row(at(judged, threshold, cost_per_call=price)))
    typer.echo(f"at the configured threshold: {configured}")
    typer.echo(f"an oracle reaches {100 * best:.1f} % with {100 * share:.0f} % of the calls")


def _row(point: "Point") -> tuple[str, ...]:
    from phikit.evals.table import NOTHING, accuracy

    return (
        f"{point.threshold:.4g}",
        f"{100 * point.share:.0f} %",
        accuracy(point.accuracy.mean, point.accuracy.stderr),
        NOTHING if point.kept is None else f"{100 * point.kept:.0f} %",
        f"{point.cost:.6f}",
    )
