"""`phikit bench`: how fast a model is here, and what part of the memory's speed that is."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.cli.locate import RUN_HELP, complete_model, locate
from phikit.cli.speaker import Dtype
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    from phikit.generate.bench import Plan, Speed, Spread
    from phikit.generate.engine import Engine

PROMPT_TOKENS = 512
BATCHES = (1, 8, 32)
BANDWIDTH_ROUNDS = 5

PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt",
        min=1,
        metavar="N",
        help=f"Tokens of every prompt; {PROMPT_TOKENS}, or half the context if that is less.",
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--new",
        min=1,
        metavar="N",
        help="Tokens that each sequence decodes in a round; 64, or what the context leaves.",
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option(
        "--batch", min=1, metavar="N", help="Decode so many at once; may be repeated. 1, 8 and 32."
    ),
]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Rounds of every measurement.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")]


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=RUN_HELP, autocompletion=complete_model)
    ],
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = None,
    batches: Batches = None,
    rounds: Rounds = 3,
    threads: Threads = None,
    dtype: Dtype = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, at the end, and nothing else.")
    ] = False,
) -> None:
    """Measure a model on this machine: prefill, decoding, time to first token, memory.

    Decoding reads all weights and the cached keys and values for every step, so the speed of memory
    bounds it. That speed is measured too: several operations of torch read one GiB, and the fastest
    counts. What decoding reads in a second is given as a share of it. A large batch is bound by
    arithmetic instead, and weights that fit into the processor's cache may be read faster than
    memory.

    Medians over the rounds, with the lowest and the highest.
    """
    with stoppable(kept="a measurement keeps nothing until it is done"):
        from phikit.base.device import set_threads
        from phikit.generate.language_model import load

        in_use = set_threads(threads)
        place = locate(model).model
        started = time.perf_counter()
        engine = load(place, dtype=dtype).engine
        load_s = time.perf_counter() - started
        asked = (prompt_tokens, new_tokens, rounds)
        plan = _plan(engine, *asked, tuple(sorted(set(batches or BATCHES))))
        about = {"model": model, "threads": in_use, "load_s": load_s}
        result = {**about, **_measured(engine, plan)}
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _show(result)


def _plan(
    engine: "Engine",
    prompt_tokens: int | None,
    new_tokens: int | None,
    rounds: int,
    batches: tuple[int, ...],
) -> "Plan":
    """What to measure; what was not asked for is chosen to fit the context."""
    from phikit.generate.bench import Plan

    context = engine.model.config.max_context
    prompt_tokens = prompt_tokens or min(PROMPT_TOKENS, context // 2)
    room = max(1, (context - prompt_tokens - 1) // rounds)
    return Plan(prompt_tokens, new_tokens or min(64, room), batches, rounds)


def _measured(engine: "Engine", plan: "Plan") -> dict[str, Any]:
    """All figures of a loaded model, under their names in the JSON."""
    from rich.console import Console

    from phikit.base.bandwidth import read_speeds
    from phikit.base.device import peak_memory_bytes
    from phikit.base.progress import Progress
    from phikit.generate.bench import Spread, measure, weight_bytes
    from phikit.nn import kernels

    with Progress(console=Console(stderr=True)) as progress:
        progress.task("bench", plan.work)
        speed = measure(
            engine, plan, on_progress=lambda task, tokens: progress.advance(tokens, now=task)
        )
        peak = peak_memory_bytes()  # before the block that the bandwidth needs
        progress.task("memory speed", BANDWIDTH_ROUNDS)
        bandwidths = []
        for bytes_per_s in read_speeds(rounds=BANDWIDTH_ROUNDS):
            bandwidths.append(bytes_per_s)
            progress.advance(GB_per_s=bytes_per_s / 1e9)
    bandwidth = Spread.of(bandwidths)
    return {
        "weight_bytes": weight_bytes(engine.model),
        "peak_memory_bytes": peak,
        "kernels": kernels.status(),
        "bandwidth_bytes_per_s": bandwidth._asdict(),
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "rounds": plan.rounds,
        **_speeds(speed, bandwidth),
    }


def _speeds(speed: "Speed", bandwidth: "Spread") -> dict[str, Any]:
    return {
        "first_token_s": speed.first_token_s._asdict(),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s._asdict(),
        "decode": [
            {
                "batch": row.batch,
                "tokens_per_s": row.tokens_per_s._asdict(),
                "tokens_per_s_and_sequence": row.tokens_per_s.median / row.batch,
                "bytes_per_step": round(row.bytes_per_step),
                "share_of_bandwidth": row.bytes_per_s / bandwidth.median,
            }
            for row in speed.decode
        ],
    }


def _show(result: dict[str, Any]) -> None:
    """The figures as two tables: what is fixed, and the speeds."""
    from rich.table import Table

    from phikit.cli.screen import in_bytes, screen

    bandwidth = result["bandwidth_bytes_per_s"]
    rows = {
        "model": result["model"],
        "threads": str(result["threads"]),
        "kernels": result["kernels"],
        "loaded in": f"{result['load_s']:.2f} s",
        "weights": in_bytes(result["weight_bytes"]),
        "peak memory": in_bytes(result["peak_memory_bytes"]),
        "memory speed": f"{in_bytes(round(bandwidth['median']))} / s",
        "first token": f"{_spread(result['first_token_s'])} s after a prompt of "
        f"{result['prompt_tokens']} tokens",
    }
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows.items():
        facts.add_row(name, value)
    speeds = Table(box=None, pad_edge=False, header_style="bold")
    speeds.add_column("")
    for heading in ("tokens / s", "each", "read a step", "of memory speed"):
        speeds.add_column(heading, justify="right")
    speeds.add_row("prefill", _spread(result["prefill_tokens_per_s"]))
    for row in result["decode"]:
        speeds.add_row(
            f"decode, batch {row['batch']}",
            _spread(row["tokens_per_s"]),
            f"{row['tokens_per_s_and_sequence']:.4g}",
            in_bytes(row["bytes_per_step"]),
            f"{100 * row['share_of_bandwidth']:.0f} %",
        )
    console = screen()
    console.print(facts)
    console.print()
    console.print(speeds)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.4g} ({values['low']:.4g}–{values['high']:.4g})"
