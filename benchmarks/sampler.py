"""The sampler's inverse CDF against `torch.multinomial`, on this CPU.

python -m benchmarks.sampler [--threads 2]
"""

import argparse
import os
import statistics
import time

from rich.console import Console
from rich.table import Table

SHAPES = ((64, 49152), (512, 1024))
"""Rows x vocabulary: SmolLM2 and the nano model."""
ROUNDS = 30


def main() -> None:
    """Print milliseconds for one token of every row, medians over alternating rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    import torch

    from phikit.generate.sample import Sampling, inverse_cdf, sample, stream_ids

    torch.set_num_threads(threads)
    shown = Table(title="drawing one token per row, ms")
    for heading in (
        "rows x vocabulary",
        "softmax",
        "multinomial",
        "inverse CDF",
        "ratio",
        "sample()",
    ):
        shown.add_column(heading, justify="right")
    for rows, vocabulary in SHAPES:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(rows, vocabulary, generator=generator)
        weights = logits.softmax(-1)
        u = torch.rand(rows, generator=generator, dtype=torch.float64)
        streams = stream_ids(torch.zeros(rows, dtype=torch.long), torch.arange(rows))
        nothing, everything = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
        sampling = Sampling(torch.ones(rows), nothing, everything, streams)
        ways = {
            "softmax": lambda logits=logits: logits.softmax(-1),
            "multinomial": lambda weights=weights: torch.multinomial(weights, 1),
            "inverse CDF": lambda weights=weights, u=u: inverse_cdf(weights, u),
            "sample": lambda logits=logits, s=sampling: sample(logits, s, step=0),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - started))
        softmax, theirs, ours, whole = (statistics.median(t[1:]) for t in times.values())
        cells = [f"{ms:.2f}" for ms in (softmax, theirs, ours)]
        shown.add_row(f"{rows} x {vocabulary}", *cells, f"{theirs / ours:.1f}x", f"{whole:.2f}")
    Console().print(shown)


if __name__ == "__main__":
    main()
