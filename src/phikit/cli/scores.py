"""The numbers of one evaluation, as data for `--json` and as text for a terminal."""

from collections.abc import Mapping
from typing import Any

import typer
from rich.table import Table

from phikit.cli.screen import screen
from phikit.evals.scorer import STATUSES
from phikit.evals.stats import Estimate, avg_at, maj_at_n, pass_at
from phikit.evals.table import accuracy
from phikit.evals.task import EvalResult


def scores(result: EvalResult, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of `EvalResult`, the sampling, and with several replies avg@n, pass@k, maj@n."""
    n = settings["num_samples"]
    outcomes = result.outcomes()
    numbers: dict[str, Any] = {
        "task": result.task,
        "sampling": settings,
        **result.summary(),
    }
    if n > 1:
        correct = [[value == 1.0 for value in replies] for replies in outcomes]
        numbers[f"avg@{n}"] = _plain(avg_at(outcomes, n))
        numbers |= {f"pass@{k}": _plain(pass_at(correct, k)) for k in _powers_of_two(n)}
        numbers[f"maj@{n}"] = _plain(maj_at_n(result.votes()))
    return numbers


def show_scores(numbers: Mapping[str, Any]) -> None:
    """Print what `scores` returned."""
    sampling = numbers["sampling"]
    replies = "1 reply" if sampling["num_samples"] == 1 else f"{sampling['num_samples']} replies"
    counts = numbers["statuses"]
    typer.echo(
        f"{numbers['task']}: {numbers['n']} problems, {replies} each "
        f"at temperature {sampling['temperature']:g}"
    )
    typer.echo("   ".join(f"{status} {counts[status]}" for status in STATUSES))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("accuracy", accuracy(numbers["accuracy"], numbers["stderr"]))
    for name, value in numbers.items():
        if name.startswith(("pass@", "maj@")) and name != "pass@1":  # which is the accuracy
            table.add_row(name, accuracy(value["accuracy"], value["stderr"]))
    table.add_row("mean reply", f"{numbers['mean_tokens']:.0f} tokens")
    for steps, cell in numbers["by_steps"].items():
        share = accuracy(cell["accuracy"], cell["stderr"])
        table.add_row(f"{steps} steps", share, f"of {cell['n']}")
    for family, cell in numbers.get("senses", {}).items():
        table.add_row(
            f"{family}, {cell['measure']}", f"{100 * cell['value']:.1f} %", f"of {cell['n']}"
        )
    screen().print(table)


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {"accuracy": estimate.mean, "stderr": estimate.stderr, "n": estimate.n}


def _powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
