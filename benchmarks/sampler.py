"""The sampler beside softmax, `torch.multinomial` and a sort of the vocabulary, on this CPU.

python -m benchmarks.sampler [--threads 2]

Rows of logits fall with the rank of an id as a power law does, some steeply and some slowly, as the
next tokens of text do: the nucleus of top-p 0.9 is a few ids for most rows, thousands for some.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from phikit.generate.sample import Sampling, sample, stream_ids

SHAPES = ((1, 49152), (64, 49152), (8, 200064), (512, 1024))
"""Rows x vocabulary: SmolLM2, Phi-4-mini and the nano model."""
CUTS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "k, p and min-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
ROUNDS = 20


def main() -> None:
    """Print milliseconds for one token of every row, medians over alternating rounds."""
    parser = argparse.ArgumentParser(description="The sampler beside what it replaces.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    columns = [measured(rows, vocabulary) for rows, vocabulary in SHAPES]
    shown = Table(title="one token for each row, ms and in softmaxes", title_justify="left")
    shown.add_column("", no_wrap=True)
    for rows, vocabulary in SHAPES:
        shown.add_column(f"{rows} x {vocabulary}", justify="right", no_wrap=True)
    for name in columns[0]:
        cells = (f"{c[name]:.2f} ({c[name] / c['softmax']:.1f}x)" for c in columns)
        shown.add_row(name, *cells)
    Console().print(shown)


def measured(rows: int, vocabulary: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    logits_RV = power_law(rows, vocabulary)
    weights_RV = logits_RV.softmax(-1)
    steps_R = torch.zeros(rows, dtype=torch.long)
    ways: dict[str, Callable[[], object]] = {
        "softmax": lambda: logits_RV.softmax(-1),
        "multinomial": lambda: torch.multinomial(weights_RV, 1),
        "sort": lambda: logits_RV.sort(-1, descending=True),
        "sample()": lambda: sample(logits_RV, sampling(rows), steps_R=steps_R),
    }
    for name, cut in CUTS.items():
        made = sampling(rows, **cut)
        ways[f"  {name}"] = lambda made=made: sample(logits_RV, made, steps_R=steps_R)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def power_law(rows: int, vocabulary: int) -> Tensor:
    """Logits that fall with the logarithm of the rank, ids in random order; exponents 1.2 to 3."""
    generator = torch.Generator().manual_seed(0)
    falling = -torch.arange(1, vocabulary + 1).log()
    exponents = torch.linspace(3.0, 1.2, rows)
    return torch.stack(
        [e * falling[torch.randperm(vocabulary, generator=generator)] for e in exponents]
    )


def sampling(
    rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sampling:
    """The same parameters for every row."""
    return Sampling(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        stream_ids(torch.zeros(rows, dtype=torch.long), torch.arange(rows)),
    )


if __name__ == "__main__":
    main()
