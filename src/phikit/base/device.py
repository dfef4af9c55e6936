"""Threads, dtypes, ranks and memory: the few facts about the machine that the rooms share."""

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from phikit.base.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True, slots=True)
class Rank:
    """One process among `size` that train together."""

    index: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.index == 0


def set_threads(count: int | None) -> int:
    """Limit torch to `count` CPU threads (None keeps its own choice); returns the number in use.

    Raises:
        ConfigError: `count` is below 1.
    """
    if count is not None:
        if count < 1:
            raise ConfigError(
                f"threads is {count}", fix="give 1 or more, or null for torch's choice"
            )
        torch.set_num_threads(count)
    return torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """A product's sums are shared out among threads, so their number shows in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_memory() -> None:
    """Let this process keep the memory that tensors leave, up to a gigabyte, for the next ones.

    glibc gives large blocks back to the system at once and gets them anew a moment later, page by
    page: a tenth of the time of a small training step. Nothing happens with other libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(setting, 1 << 30)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called `name`.

    Raises:
        ConfigError: it is not one that models are kept in.
    """
    if name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", fix=f"choose from: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def peak_memory_bytes() -> int:
    """The most memory this process has held so far (resident set; not the GPU's)."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count what the parent held when it started this process
        [line] = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
