"""The CPU kernels' products beside torch's own, at the sizes of two models.

python -m benchmarks.kernels [--threads 2] [--quick]

Each way reads several copies of its weights in turn, so that none stays in the nearer caches. The
share is that of the speed at which this machine reads memory; copies that fit its last cache can
exceed it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

SIZES = {"SmolLM2-135M": (3072, 576), "Phi-4-mini": (16384, 3072)}
"""Outputs and inputs of `gate_up_proj`."""
ROWS = (1, 8, 32)
COPIES_BYTES = 800_000_000
"""Of weights in bfloat16; the packed ones are as many."""
GROUP = 32


def main() -> None:
    """Print milliseconds, GB/s of weights and their share, medians over alternating rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="three rounds")
    arguments = parser.parse_args()
    import torch

    from phikit.base.bandwidth import read_speeds
    from phikit.nn import kernels

    torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 15
    memory = statistics.median(read_speeds(rounds=rounds))
    shown = Table(title=f"{kernels.status().split()[0]} kernels; memory {memory / 1e9:.1f} GB/s")
    for heading in ("weights", "rows", "product", "ms", "GB/s", "of memory"):
        shown.add_column(heading, justify="right")
    with torch.inference_mode():
        for name, (outputs, inputs) in SIZES.items():
            copies = min(16, COPIES_BYTES // (2 * outputs * inputs))
            make = _ways(outputs, inputs, copies=copies)
            for rows in ROWS:
                x = torch.randn(rows, inputs)
                for way, (seconds, size) in _medians(make(x), copies, rounds).items():
                    speed = size / seconds
                    cells = (f"{1e3 * seconds:.3f}", f"{speed / 1e9:.1f}", f"{speed / memory:.0%}")
                    shown.add_row(name, str(rows), way, *cells)
                shown.add_section()
    Console().print(shown)


Way = tuple[Callable[[int], object], int]
"""A product with copy i of its weights, and the bytes that it reads."""


def _ways(outputs: int, inputs: int, *, copies: int):
    """Makes, for some activations, every way to compute their product."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from phikit.nn import kernels
    from phikit.nn.quantised import pack, pack_scales

    size = outputs * inputs
    ones = torch.ones(outputs, inputs // GROUP)
    plain = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
    wide = [weight.float() for weight in plain[: max(1, copies // 2)]]
    q = {bits: torch.full((outputs, inputs), bits // 2, dtype=torch.int8) for bits in (4, 8)}
    packed = {bits: (pack(q[bits], bits=bits, group=GROUP), pack_scales(ones)) for bits in q}
    packed = {bits: [tuple(map(Tensor.clone, w)) for _ in plain] for bits, w in packed.items()}
    theirs_4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q[4].int(), 1)
    theirs_4 = [theirs_4.clone() for _ in plain]
    theirs_8 = [q[8].clone() for _ in plain]
    zeros = torch.stack([ones.T, 0 * ones.T], -1).bfloat16().contiguous()
    per_row = torch.ones(outputs).bfloat16()

    def make(x: Tensor) -> dict[str, Way]:
        x_16 = x.bfloat16()
        aten = torch.ops.aten

        def ours(bits: int) -> Callable[[int], Tensor]:
            return lambda i: kernels.packed_linear(x_16, *packed[bits][i], out_features=outputs)

        return {
            "float32 torch": (lambda i: F.linear(x, wide[i % len(wide)]), 4 * size),
            "float32 ours": (lambda i: kernels.linear(x, wide[i % len(wide)]), 4 * size),
            "bfloat16 torch": (lambda i: F.linear(x_16, plain[i]), 2 * size),
            "bfloat16 ours": (lambda i: kernels.linear(x_16, plain[i]), 2 * size),
            "int8 torch": (lambda i: aten._weight_int8pack_mm(x_16, theirs_8[i], per_row), size),
            "int8 ours": (ours(8), size + 2 * size // GROUP),
            "int4 torch": (
                lambda i: aten._weight_int4pack_mm_for_cpu(x_16, theirs_4[i], GROUP, zeros),
                size // 2 + 4 * size // GROUP,
            ),
            "int4 ours": (ours(4), size // 2 + 2 * size // GROUP),
        }

    return make


def _medians(ways: dict[str, Way], copies: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds of one product in each way, and the bytes it reads."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (run, _) in ways.items():
            started = time.perf_counter()
            for i in range(copies):
                run(i)
            times[name].append((time.perf_counter() - started) / copies)
    return {name: (statistics.median(t[1:]), ways[name][1]) for name, t in times.items()}


if __name__ == "__main__":
    main()
