"""Decoding and prefill side by side with transformers and llama.cpp, on the same weights.

    python -m benchmarks.decode [--rounds 5] [--threads 2] [--quick]
    python -m benchmarks.decode --geometry phi4-mini

The first compares on SmolLM2-135M: every engine has a process of its own, and they take turns. A
side of llama.cpp is the fastest of several settings, tried before. The second decodes with 3.84 B
random weights of Phi-4-mini's shape, in turns with reading memory, and tells what share of the
memory's speed decoding reaches; it needs 9 GB of memory.

Both write their part of docs/results/decode.json.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.duel import Result, Side, fastest, in_a_process, machine, take_turns
from benchmarks.geometry import geometry_sides
from benchmarks.peers import ENVIRONMENT, SETTINGS, Job, llama_cpp, phikit, transformers, write_gguf
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers")
QUANTISED = ("q4_0.gguf", "q8_0.gguf", "bf16.gguf")
TRIAL_TOKENS, TRIAL_ROUNDS = 16, 3
SHARES = {"phikit int8": 0.70, "phikit int4": 0.60}
"""Wanted shares of the memory's speed, at Phi-4-mini's geometry."""


class Target(NamedTuple):
    """What one side should be faster than, and by what factor."""

    ours: str
    peer: str
    factor: float


class Comparison(NamedTuple):
    """Sides that take turns in the same work.

    Attributes:
        ours: weights of phikit's sides.
        transformers: whether it takes part.
        llama_cpp: groups of weights; the fastest of each group takes part.
    """

    name: str
    work: dict[str, Any]
    ours: tuple[str, ...]
    transformers: bool
    llama_cpp: tuple[tuple[str, ...], ...]
    targets: tuple[Target, ...]


COMPARISONS = (
    Comparison(
        "decode, batch 1",
        {"work": "decode", "batch": 1},
        ("bf16", "int8", "int4"),
        True,
        tuple((weights,) for weights in QUANTISED),
        (
            Target("phikit int4", "transformers", 4.0),
            Target("phikit int8", "transformers", 3.5),
            Target("phikit bf16", "transformers", 1.3),
        ),
    ),
    Comparison(
        "decode, batch 8",
        {"work": "decode", "batch": 8},
        ("int4", "bf16"),
        True,
        (QUANTISED[:1],),
        (Target("phikit int4", "llama.cpp q4_0", 1.3),),
    ),
    Comparison(
        "decode, batch 32",
        {"work": "decode", "batch": 32},
        ("bf16", "int4"),
        True,
        (QUANTISED,),
        (Target("phikit bf16", "llama.cpp", 1.2),),
    ),
    Comparison(
        "prefill of 512",
        {"work": "prefill", "prompt_tokens": 512},
        ("bf16", "int4"),
        True,
        (QUANTISED,),
        (Target("phikit bf16", "transformers", 1.0), Target("phikit bf16", "llama.cpp", 1.5)),
    ),
)


def main() -> None:
    """Measure what was asked for, print it, and put it into the record."""
    options = _options()
    console = Console(width=110)
    record = {"threads": options.threads, "machine": machine(PACKAGES)}
    if options.geometry:
        sides = geometry_sides(options.threads, scale=options.scale)
        results = take_turns(sides, rounds=options.rounds, console=console)
        record |= geometry_record(results)
        console.print(geometry_table(record))
    else:
        with tempfile.TemporaryDirectory(prefix="phikit-benchmark-") as folder:
            in_a_process(prepare, Path(folder))
            job = Job(Path(folder), "", options.threads, "decode")
            chosen = [c for c in COMPARISONS if any(word in c.name for word in options.only)]
            record["llama_cpp"] = _llama_build()
            record["comparisons"] = {
                c.name: compare(c, job, options, console=console) for c in chosen
            }
        for name, row in record["comparisons"].items():
            console.print(comparison_table(name, row))
    part = "geometry" if options.geometry else "smollm2"
    write(options.out, part, record)
    console.print(f"wrote {options.out}")


def prepare(folder: Path) -> None:
    """SmolLM2-135M in bfloat16, as a folder for us and transformers, quantised, and as GGUF."""
    import torch

    import phikit as library
    from phikit.nn.quantised import QuantConfig
    from phikit.weights.quantise import quantise
    from phikit.weights.save import save

    loaded = library.load("smollm2", dtype=torch.bfloat16)
    save(folder / "bf16", loaded)
    if _has_llama():
        write_gguf(loaded, folder)
    for bits in (8, 4):
        packed = library.load(folder / "bf16")
        quantise(packed, QuantConfig.resolve({"bits": bits}))
        save(folder / f"int{bits}", packed)


def compare(
    comparison: Comparison, job: Job, options: argparse.Namespace, *, console: Console
) -> dict[str, Any]:
    """All sides of a comparison in turns."""
    console.print(f"[bold]{comparison.name}")
    job = replace(job, **comparison.work)
    if options.quick:
        job = replace(job, new_tokens=8)
    sides = [
        Side(f"phikit {weights}", phikit, replace(job, weights=weights))
        for weights in comparison.ours
    ]
    if comparison.transformers:
        name = "transformers bf16"
        sides.append(Side(name, transformers, replace(job, weights="bf16"), ENVIRONMENT))
    failures = {}
    for group in comparison.llama_cpp:
        try:
            sides.append(best_llama(group, job, console=console))
        except RuntimeError as error:
            failures["llama.cpp " + "/".join(group)] = str(error)
    results = take_turns(sides, rounds=options.rounds, console=console)
    return {
        "work": {**comparison.work, "new_tokens": job.new_tokens, "context": job.prompt_tokens},
        "sides": [result._asdict() for result in results],
        "could_not_run": failures,
        "targets": [measured(target, results) for target in comparison.targets],
    }


def best_llama(group: Sequence[str], job: Job, *, console: Console) -> Side:
    """The fastest of llama.cpp's settings for these weights; RuntimeError if none runs."""
    trial = replace(job, new_tokens=min(job.new_tokens, TRIAL_TOKENS))
    sides = [
        Side(
            f"llama.cpp {weights.removesuffix('.gguf')}, {setting}",
            llama_cpp,
            replace(trial, weights=weights, setting=setting),
            ENVIRONMENT,
        )
        for weights in group
        for setting in SETTINGS
    ]
    best = fastest(sides, console=console, rounds=TRIAL_ROUNDS)
    return best._replace(job=replace(best.job, new_tokens=job.new_tokens))


def measured(target: Target, results: Sequence[Result]) -> dict[str, Any]:
    """The ratio of medians, and the ratios of the single rounds, beside what is wanted."""
    ours = next(result for result in results if result.name == target.ours)
    peers = [result for result in results if result.name.startswith(target.peer)]
    if not peers:
        return {**target._asdict(), "ratio": None}
    ratios = [a / b for a, b in zip(ours.rates, peers[0].rates, strict=True)]
    return {
        **target._asdict(),
        "peer": peers[0].name,
        "ratio": median(ours.rates) / median(peers[0].rates),
        "ratios_of_rounds": [min(ratios), max(ratios)],
    }


def geometry_record(results: Sequence[Result]) -> dict[str, Any]:
    """What share of the memory's speed each side reaches, in each round and by medians."""
    *sides, memory = results
    rows = []
    for side in sides:
        shares = [
            rate * side.facts["bytes_per_token"] / read
            for rate, read in zip(side.rates, memory.rates, strict=True)
        ]
        share = median(side.rates) * side.facts["bytes_per_token"] / median(memory.rates)
        about = {"share": share, "shares_of_rounds": shares, "wanted": SHARES[side.name]}
        rows.append({**side._asdict(), **about})
    return {"memory_bytes_per_s": memory.rates, "sides": rows}


def geometry_table(record: dict[str, Any]) -> Table:
    """One line a side."""
    speed = median(record["memory_bytes_per_s"]) / 1e9
    table = Table(title=f"3.84 B weights, batch 1; memory is read at {speed:.1f} GB / s")
    for heading in ("", "tokens / s", "GB a token", "share of memory speed", "in rounds", "GiB"):
        table.add_column(heading, justify="right")
    for side in record["sides"]:
        low, high = (100 * f(side["shares_of_rounds"]) for f in (min, max))
        table.add_row(
            side["name"],
            f"{median(side['rates']):.2f}",
            f"{side['facts']['bytes_per_token'] / 1e9:.2f}",
            f"{100 * side['share']:.0f} %",
            f"{low:.0f}–{high:.0f} %",
            f"{side['peak_bytes'] / 2**30:.1f}",
        )
    return table


def comparison_table(name: str, row: dict[str, Any]) -> Table:
    """One line a side, then the targets."""
    table = Table(title=f"{name}, tokens / s", title_justify="left")
    for heading in ("", "median", "min", "max", "peak MiB"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for side in row["sides"]:
        rates, peak = side["rates"], side["peak_bytes"] / 2**20
        figures = [f"{value:,.1f}" for value in (median(rates), min(rates), max(rates))]
        table.add_row(side["name"], *figures, f"{peak:,.0f}")
    for failed in row["could_not_run"]:
        table.add_row(failed, "could not run")
    for target in row["targets"]:
        words = f"{target['ours']} : {target['peer']}, at least {target['factor']}"
        if target["ratio"] is None:
            table.add_row(words, "–")
        else:
            low, high = target["ratios_of_rounds"]
            ratios = (target["ratio"], low, high)
            table.add_row(words, *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def write(path: Path, part: str, record: dict[str, Any]) -> None:
    """Put one part into the file and leave the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    old = content.get(part, {})
    if "comparisons" in record:
        record["comparisons"] = old.get("comparisons", {}) | record["comparisons"]
    path.write_text(json.dumps(content | {part: record}, indent=1, default=asdict) + "\n")


def _has_llama() -> bool:
    """Whether llama.cpp can take part."""
    return importlib.util.find_spec("llama_cpp") is not None


def _llama_build() -> str:
    if not _has_llama():
        return "not installed"
    build = "rebuilt" if "LLAMA_CPP_LIB_PATH" in os.environ else "as installed"
    return f"llama-cpp-python {version('llama-cpp-python')}, {build}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="counted rounds a side (5; 1 if quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    parser.add_argument("--only", nargs="+", default=[""], help="words of comparisons, as: prefill")
    parser.add_argument("--geometry", choices=["phi4-mini"], help="random weights of this shape")
    parser.add_argument(
        "--scale", choices=["full", "small"], default="full", help=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, help="where the JSON record goes")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    folder = ROOT / ("bench-results" if options.quick else "docs/results")
    options.out = options.out or folder / "decode.json"
    return options


if __name__ == "__main__":
    main()
