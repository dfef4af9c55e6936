"""The console that tables are printed on."""

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
