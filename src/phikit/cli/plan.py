"""What `--dry-run` prints: every setting as `--set` takes it, and the budget."""

import json

import typer
from rich.table import Table

from phikit.cli.screen import in_bytes, screen
from phikit.cli.settings import leaves
from phikit.evals.table import count
from phikit.recipes.budget import Amount, Budget, Memory, budget
from phikit.recipes.config import PipelineConfig

MARKS = {"exact": "", "estimate": "≈ ", "at most": "≤ "}


def show_plan(config: PipelineConfig) -> None:
    """Print the settings, one `a.b=value` a line, and what they will cost."""
    for path, value in leaves(config.model_dump(mode="json")):
        typer.echo(f"{path}={json.dumps(value, ensure_ascii=False)}")
    typer.echo()
    _show_budget(budget(config), config.dtype)


def _show_budget(costs: Budget, dtype: str) -> None:
    console = screen()
    total, trainable = costs.parameters
    typer.echo(f"{total:,} parameters, {trainable:,} of them trained; {dtype}")
    columns = ("Stage", "Steps", "Tokens trained", "Tokens generated", "Memory")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for stage in costs.stages:
        amounts = (stage.steps, stage.trained_tokens, stage.generated_tokens)
        table.add_row(stage.name, *map(_amount, amounts), f"≈ {in_bytes(stage.memory.peak)}")
    table.add_row("evaluation, each", "", "", _amount(costs.evaluation_tokens), "")
    console.print(table)
    largest = max((stage.memory for stage in costs.stages), key=lambda memory: memory.peak)
    typer.echo(_memory(largest))


def _amount(amount: Amount) -> str:
    if amount.value is None:
        return "unknown"
    return f"{MARKS[amount.kind]}{count(amount.value)}"


def _memory(memory: Memory) -> str:
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in memory._asdict().items() if size)
    return f"memory at most: {parts}; besides, the libraries and the data"
