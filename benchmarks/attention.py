"""Written-out attention against torch's fused kernel, forward and backward, on this CPU.

The two cases of training: rows of one document, and packed rows, where each row has its own mask.
"""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

LENGTHS = (128, 256, 512, 1024)
TOKENS = 4096
"""Tokens of a batch at every length."""
HEADS, KV_HEADS, WIDTH = 6, 2, 32
"""The nano model's heads."""
DOCUMENT = 100
"""Tokens of a document in a packed row."""
CASES = ("one document", "packed")


def measure_attention(*, threads: int, quick: bool = False) -> None:
    """Print medians over alternating rounds; a ratio above 1 is in favour of writing it out."""
    import torch

    torch.set_num_threads(threads)
    rounds = 3 if quick else 15
    shown = Table(title=f"attention, forward and backward, ms per {TOKENS} tokens")
    for heading in ("T", "dtype", "rows", "written out", "fused", "fused / written out"):
        shown.add_column(heading, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            ways = _ways(length, dtype)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds + 1):
                for name, run in ways.items():
                    started = time.perf_counter()
                    run()
                    times[name].append(1e3 * (time.perf_counter() - started))
            medians = {name: statistics.median(found[1:]) for name, found in times.items()}
            for case in CASES:
                ours, theirs = medians[f"{case}, written out"], medians[f"{case}, fused"]
                name = str(dtype).removeprefix("torch.")
                cells = (f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}x")
                shown.add_row(str(length), name, case, *cells)
    Console().print(shown)


def _ways(length: int, dtype) -> dict[str, Callable[[], None]]:
    """One layer's attention, forward and backward, in each way; the masks are made beforehand."""
    import torch
    import torch.nn.functional as F

    from phikit.nn.attention import CausalAttention, explicit_attention, stacked_bias

    rows = TOKENS // length
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, heads, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    documents = (torch.arange(length) // DOCUMENT).expand(rows, length)
    packed = CausalAttention(documents).allowed(length, q.device)
    layout = {"kv_heads": KV_HEADS, "group": HEADS // KV_HEADS, "dtype": dtype}
    packed_bias = stacked_bias(packed, **layout)
    causal_bias = stacked_bias(CausalAttention().allowed(length, q.device), **layout)

    def fused(**how) -> torch.Tensor:
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*swapped, enable_gqa=True, **how)

    def there_and_back(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            forward().sum().backward()
            q.grad = k.grad = v.grad = None

        return run

    forward: dict[str, Callable[[], torch.Tensor]] = {
        "one document, written out": lambda: explicit_attention(q, k, v, bias=causal_bias),
        "one document, fused": lambda: fused(is_causal=True),
        "packed, written out": lambda: explicit_attention(q, k, v, bias=packed_bias),
        "packed, fused": lambda: fused(attn_mask=packed[:, None]),
    }
    return {name: there_and_back(way) for name, way in forward.items()}
