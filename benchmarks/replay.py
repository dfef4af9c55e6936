"""A step of decoding replayed as one call, beside the same step called from Python.

    python -m benchmarks.replay [--threads 2] [--rounds 30]

SmolLM2-135M, every row after 128 tokens of its own. The two ways take turns at the same step, from
embeddings to the final norm; writes docs/results/replay.json.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.duel import machine
from rich.console import Console
from rich.table import Table

TARGET = Path(__file__).resolve().parent.parent / "docs" / "results" / "replay.json"
WEIGHTS = ("bf16", "int8", "int4")
ROWS = (1, 8, 32)
CONTEXT = 128


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    table = Table(title="one step, ms")
    for heading in ("weights", "rows", "called", "replayed", "ratio"):
        table.add_column(heading, justify="right")
    record = []
    for weights in WEIGHTS:
        model = loaded(weights)
        for rows in ROWS:
            called, replayed = durations(model, rows, rounds=options.rounds)
            times = {"called_ms": 1e3 * median(called), "replayed_ms": 1e3 * median(replayed)}
            ratio = median(a / b for a, b in zip(called, replayed, strict=True))
            record.append({"weights": weights, "rows": rows, **times, "ratio": ratio})
            cells = (f"{value:.2f}" for value in (*times.values(), ratio))
            table.add_row(weights, str(rows), *cells)
    Console().print(table)
    facts = {"machine": machine(("torch",)), "threads": options.threads, "steps": record}
    TARGET.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {TARGET}")


def loaded(weights: str) -> Any:
    """SmolLM2-135M with such weights."""
    import torch

    import phikit
    from phikit.nn.quantised import QuantConfig
    from phikit.weights.quantise import quantise

    model = phikit.load("smollm2", dtype=torch.bfloat16)
    if weights != "bf16":
        quantise(model, QuantConfig.resolve({"bits": int(weights.removeprefix("int"))}))
    return model.model


def durations(model: Any, rows: int, *, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the same step, called and replayed in turn."""
    import torch

    from phikit.generate.attend import PagedAttention, Stretch
    from phikit.generate.blocks import BLOCK_TOKENS
    from phikit.generate.cache import PagedCache
    from phikit.generate.replay import Replays

    with torch.inference_mode():
        each = -(-CONTEXT // BLOCK_TOKENS)
        cache = PagedCache(model.config, blocks=rows * each, dtype=model.dtype, device=model.device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        positions = torch.full((rows,), CONTEXT - 1)
        attend = PagedAttention(
            cache,
            torch.arange(rows * each, dtype=torch.int32).view(rows, each),
            [Stretch(row, 1, CONTEXT - 1, row) for row in range(rows)],
            positions_S=positions,
            window=None,
        )
        x_BTD = model.embed(torch.arange(rows)[:, None])
        replays, times = Replays(model), ([], [])
        for _ in range(rounds + 3):  # the first three load, record, and warm up
            for walk, kept in zip((None, replays), times, strict=True):
                started = time.perf_counter()
                model.run_blocks(
                    x_BTD.clone(), positions_BT=positions[:, None], attend=attend, walk=walk
                )
                kept.append(time.perf_counter() - started)
    return times[0][3:], times[1][3:]


if __name__ == "__main__":
    main()
