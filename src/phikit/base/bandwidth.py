"""How fast this machine reads memory: the bound of a decoder, which reads all weights for a token.

Which torch operation comes nearest to the memory's speed differs between processors, so several
that read the same block take turns, and the fastest is what counts. The block is larger than any
cache, and no operation does more than an addition for a number.
"""

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 30
ROW = 4096
"""Numbers in a row, for the operations that go row by row."""
REPEATS = 4
"""A single reading may meet a lucky moment of a shared machine."""


def read_speeds(*, rounds: int, block_bytes: int = BLOCK_BYTES) -> Iterator[float]:
    """Bytes a second of the fastest way to read a block, for one round after another.

    Takes a block of memory until it ends. Runs on torch's CPU threads.
    """
    numbers = torch.ones(block_bytes // 4 // ROW * ROW)
    ways = _ways(numbers)
    _fastest(ways)
    for _ in range(rounds):
        yield numbers.nbytes / _fastest(ways)


def _fastest(ways: Mapping[str, Callable[[], Tensor]]) -> float:
    """Seconds that one reading takes in the fastest way, a mean over several."""
    seconds = []
    for read in ways.values():
        started = time.perf_counter()
        for _ in range(REPEATS):
            read()
        seconds.append((time.perf_counter() - started) / REPEATS)
    return min(seconds)


def _ways(numbers: Tensor) -> dict[str, Callable[[], Tensor]]:
    rows = numbers.view(-1, ROW)
    ones = torch.ones(ROW)
    half = len(numbers) // 2
    return {
        "sums of rows": lambda: rows.sum(1),
        "matrix times vector": lambda: torch.mv(rows, ones),
        "halves multiplied": lambda: torch.dot(numbers[:half], numbers[half:]),
    }
