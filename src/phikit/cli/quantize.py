"""`phikit quantize`: a model's weights in 4 or 8 bits, and how far that moved its predictions."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import ConfigError
from phikit.cli.locate import RUN_HELP, complete_model, locate
from phikit.cli.output import fresh
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    from phikit.base.progress import Progress
    from phikit.nn.quantised import QuantConfig
    from phikit.weights.load import Loaded
    from phikit.weights.quantise import Outcome

REPORT = "quantisation.json"
"""Where `--report` writes, in the new folder."""
PROBLEMS, NEW_TOKENS = 20, 128
"""Problems that `--report` has both models solve, and the longest reply."""
STEPS = {1: 1.0, 2: 1.0}
"""Calculations in a problem, half of them each: the smallest models solve some of these."""
MILLION = 1_000_000
SIDES = ("original", "changed")

Bits = Annotated[int, typer.Option(metavar="BITS", help="4 or 8.")]
Group = Annotated[
    int, typer.Option(metavar="N", help="Weights that share a scale; a multiple of 32.")
]
Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="rtn: round to nearest, in seconds. gptq: minutes, and nearer to the original.",
    ),
]
EmbeddingBits = Annotated[
    int,
    typer.Option(
        metavar="BITS", help="Of the embeddings and the head: 4, 8, or 16 to leave them alone."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Text for gptq, as .txt or as .jsonl of {"text"} rows; ours if not given.',
    ),
]
WantsReport = Annotated[
    bool, typer.Option("--report", help="Compare with the original, on text and on problems.")
]


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="IN", help=RUN_HELP, autocompletion=complete_model)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    bits: Bits = 4,
    group: Group = 32,
    method: Method = "rtn",
    embedding_bits: EmbeddingBits = 8,
    calibration: Calibration = None,
    report: WantsReport = False,
) -> None:
    """Quantise a model's weights, and write it as a folder that every command takes."""
    from rich.console import Console

    from phikit.base.progress import Progress
    from phikit.nn.quantised import QuantConfig
    from phikit.weights.load import load
    from phikit.weights.save import save

    settings = {"bits": bits, "group": group, "method": method, "embedding_bits": embedding_bits}
    config = QuantConfig.resolve(settings)
    if calibration is not None and config.method != "gptq":
        raise ConfigError(
            f"--calibration {calibration} goes with --method gptq alone", fix="leave it out"
        )
    with stoppable(kept="nothing is written until all is done"), fresh(out) as place:
        where = locate(model).model
        loaded = load(where)
        with Progress(console=Console(stderr=True)) as progress:
            started_s = time.process_time()
            outcome = _quantise(loaded, config, calibration, progress)
            cpu_seconds = time.process_time() - started_s
            save(place, loaded)
            numbers = None
            if report:
                numbers = _compare(load(where), load(place), progress)
                numbers |= {"quantisation": config.model_dump(), "cpu_seconds": cpu_seconds}
                content = json.dumps(numbers, indent=1) + "\n"
                (place / REPORT).write_text(content, encoding="utf-8")
    _tell(outcome)
    if numbers is not None:
        _show(numbers)
    typer.echo(out)


def _quantise(
    loaded: "Loaded", config: "QuantConfig", calibration: Path | None, progress: "Progress"
) -> "Outcome":
    from phikit.weights.quantise import quantise

    rows = _calibration_rows(loaded, calibration) if config.method == "gptq" else None
    started = time.monotonic()
    done = -1

    def advance(weights: int, total: int) -> None:
        nonlocal done
        if done < 0:
            progress.task("quantising, million weights", total // MILLION)
            done = 0
        rate = weights / max(time.monotonic() - started, 1e-3)
        progress.advance(weights // MILLION - done, weights_per_s=rate)
        done = weights // MILLION

    return quantise(loaded, config, calibration=rows, on_progress=advance)


def _calibration_rows(loaded: "Loaded", file: Path | None) -> list[list[int]]:
    from phikit.data.passages import calibration_rows, file_rows

    if file is not None:
        return file_rows(file, loaded.tokenizer, row_tokens=_row_tokens(loaded))
    return calibration_rows(loaded.tokenizer, loaded.renderer, row_tokens=_row_tokens(loaded))


def _row_tokens(loaded: "Loaded") -> int:
    from phikit.data.passages import ROW_TOKENS

    return min(ROW_TOKENS, loaded.config.max_context)


def _compare(original: "Loaded", changed: "Loaded", progress: "Progress") -> dict[str, Any]:
    """The numbers of the report."""
    from phikit.chat.text import TextRenderer
    from phikit.data.passages import held_out_rows
    from phikit.data.procedural import generate
    from phikit.evals.compare import compare_task, compare_text
    from phikit.weights.describe import weight_bytes

    rows = held_out_rows(original.tokenizer, original.renderer, row_tokens=_row_tokens(original))
    progress.task("comparing, tokens of text", sum(map(len, rows)))
    text = compare_text(original.model, changed.model, rows, on_progress=progress.advance)
    numbers: dict[str, Any] = {
        "text": text.to_dict(),
        "bytes": [weight_bytes(loaded.model) for loaded in (original, changed)],
        "task": None,
    }
    if not isinstance(original.renderer, TextRenderer):
        progress.task("comparing, replies", 2 * PROBLEMS)
        task = compare_task(
            original,
            changed,
            generate(seed=7, count=PROBLEMS, split="test", steps=STEPS),
            max_new_tokens=min(NEW_TOKENS, original.config.max_context // 2),
            on_progress=progress.advance,
        )
        numbers["task"] = task.to_dict()
    return numbers


def _tell(outcome: "Outcome") -> None:
    """What could not be quantised as asked."""
    for path in outcome.kept:
        typer.echo(f"kept as it is, its rows being no whole groups: {path}", err=True)
    if outcome.rounded:
        typer.echo(
            f"rounded to nearest, for want of calibration tokens: {len(outcome.rounded)} "
            f"experts, such as {outcome.rounded[0]}",
            err=True,
        )


def _show(numbers: dict[str, Any]) -> None:
    """The report as a table, the original beside the quantised model."""
    from rich.table import Table

    from phikit.cli.screen import in_bytes, screen
    from phikit.evals.table import accuracy

    text, task = numbers["text"], numbers["task"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "original", "quantised", "change"):
        table.add_column(column, justify="right" if column else "left")
    before, after = numbers["bytes"]
    table.add_row("weights", in_bytes(before), in_bytes(after), f"/ {before / after:.2f}")
    perplexities = (f"{text[f'{side}_perplexity']:.3f}" for side in SIDES)
    table.add_row("perplexity", *perplexities, f"{_spread(text['loss_change'], '+.4f')} nats")
    table.add_row("KL a token", "", f"{_spread(text['divergence'], '.4f')} nats")
    table.add_row("same likeliest token", "", f"{_spread(text['agreement'], '.1%')}")
    if task is not None:
        cells = (accuracy(task[side]["accuracy"], task[side]["stderr"]) for side in SIDES)
        table.add_row(
            f"accuracy, {task['original']['n']} problems",
            *cells,
            _spread({"mean": task["difference"]["delta"], **task["difference"]}, "+.1%"),
        )
    screen().print(table)


def _spread(estimate: dict[str, Any], form: str) -> str:
    """A mean and its standard error."""
    error = estimate["stderr"]
    spread = "" if error is None else f" ± {error:{form.removeprefix('+')}}"
    return f"{estimate['mean']:{form}}{spread}"
