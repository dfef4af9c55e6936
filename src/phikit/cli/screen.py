"""The console that tables are printed on, and how sizes are written."""

import os

from rich.console import Console

WIDE = 120
"""Columns where nobody says how many there are: a log file or a pipe, which wrap nothing."""


def screen() -> Console:
    """Standard output; as wide as the terminal, or `WIDE` where there is none."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDE)
    return console


def in_bytes(size: int) -> str:
    """A size as people read it: 7.67 GB, 135 MB, 16 kB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"
