"""Stacked experts: torch's grouped product against the loop and against transformers, on this CPU.

python -m benchmarks.experts [--threads 2] [--quick]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

EXPERTS, CHOICES, WIDTH, HIDDEN = 16, 2, 256, 400
"""The proportions of Phi-3.5-MoE at a sixteenth of its width."""
TOKENS = (1, 16, 256, 1024)
WAYS = ("grouped", "looped", "transformers")


def main() -> None:
    """Print milliseconds of one block of experts, medians over alternating rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 15
    shown = Table(title=f"{EXPERTS} experts, {CHOICES} a token, {WIDTH} x {HIDDEN}, ms")
    for heading in ("tokens", "dtype", "pass", *WAYS, "looped / grouped", "transformers / grouped"):
        shown.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for backward in (False, True):
                medians = _measure(_ways(tokens, dtype, backward=backward), rounds)
                grouped, looped, theirs = (medians[name] for name in WAYS)
                cells = [f"{medians[name]:.2f}" for name in WAYS]
                cells += [f"{looped / grouped:.2f}x", f"{theirs / grouped:.2f}x"]
                name = str(dtype).removeprefix("torch.")
                shown.add_row(str(tokens), name, "both" if backward else "forward", *cells)
    Console().print(shown)


def _measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _ways(tokens: int, dtype, *, backward: bool) -> dict[str, Callable[[], None]]:
    import torch
    from torch import nn
    from transformers import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeExperts

    from phikit.nn import moe

    generator = torch.Generator().manual_seed(0)
    ours = moe.Experts(EXPERTS, WIDTH, HIDDEN)
    for parameter in ours.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_local_experts": EXPERTS,
    }
    config = PhimoeConfig(**sizes)
    config._experts_implementation = "eager"
    theirs = PhimoeExperts(config)
    theirs.gate_up_proj.data, theirs.down_proj.data = (p.data for p in ours.parameters())
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_(backward)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :CHOICES]
    gates = torch.ones(tokens, CHOICES, dtype=dtype)

    def way(experts: nn.Module, how: Callable[[], AbstractContextManager]) -> Callable[[], None]:
        experts.to(dtype).requires_grad_(backward)

        def run() -> None:
            with how(), torch.set_grad_enabled(backward):
                y = experts(x, ids, gates)
                if backward:
                    y.sum().backward()
            x.grad = None
            experts.zero_grad()

        return run

    return {
        "grouped": way(ours, nullcontext),
        "looped": way(ours, lambda: patch.object(moe, "can_group", return_value=False)),
        "transformers": way(theirs, nullcontext),
    }


if __name__ == "__main__":
    main()
