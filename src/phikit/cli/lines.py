"""What is typed or piped, as whole inputs: several lines may be one.

A line that ends in a backslash goes on in the next one. Lines between two `\"""` are one input.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import typer

from phikit.base.errors import PhikitError
from phikit.base.places import data_folder

BLOCK = '"""'
QUICK_S = 0.4
"""Two Ctrl-C within so many seconds leave."""
KEPT_LINES = 1000


class Joiner:
    """Puts lines together to inputs."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._in_block = False

    @property
    def pending(self) -> bool:
        """Whether an input has begun and not ended."""
        return bool(self._parts) or self._in_block

    def push(self, line: str) -> str | None:
        """Take one line; the input that it completes, or None."""
        if self._in_block:
            text, closing, _ = line.rstrip().rpartition(BLOCK)
            is_over = bool(closing) and line.rstrip().endswith(BLOCK)
            if text or not is_over:
                self._parts.append(text if is_over else line)
            return self.take() if is_over else None
        if not self._parts and line.startswith(BLOCK):
            self._in_block = True
            rest = line.removeprefix(BLOCK)
            return self.push(rest) if rest else None
        if line.endswith("\\"):
            self._parts.append(line[:-1])
            return None
        self._parts.append(line)
        return self.take()

    def take(self) -> str:
        """What has been put together; begins anew."""
        text = "\n".join(self._parts)
        self.clear()
        return text

    def clear(self) -> None:
        """Forget what has begun."""
        self._parts.clear()
        self._in_block = False


class Interrupts:
    """Tells one Ctrl-C from two in quick succession."""

    def __init__(self) -> None:
        self._last_s = float("-inf")

    def again(self) -> bool:
        """Call at each Ctrl-C: whether another came just before."""
        before, self._last_s = self._last_s, time.monotonic()
        return self._last_s - before < QUICK_S


def typed(interrupts: Interrupts) -> Iterator[str]:
    """Inputs from the keyboard, until Ctrl-D or two quick Ctrl-C."""
    joiner = Joiner()
    while True:
        try:
            text = joiner.push(input(". " if joiner.pending else "> "))
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n/quit leaves")
            if interrupts.again():
                return
            joiner.clear()
            continue
        if text is not None:
            yield text


def piped() -> Iterator[str]:
    """Inputs from standard input, until its end."""
    # An invalid byte becomes a lone surrogate, which the tokenizer refuses by name.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore
    joiner = Joiner()
    for line in sys.stdin:
        text = joiner.push(line.rstrip("\r\n"))
        if text is not None:
            yield text
    if joiner.pending:
        yield joiner.take()


@contextmanager
def line_editing(commands: Sequence[str], *, keeps: bool) -> Iterator[None]:
    """Edit lines, recall earlier ones and complete commands, where this Python has readline.

    Args:
        commands: what Tab completes at the start of a line.
        keeps: whether lines are kept for the next time, in a file of the user's alone.
    """
    try:
        import readline
    except ImportError:
        yield
        return

    def complete(start: str, number: int) -> str | None:
        found = [command for command in commands if start and command.startswith(start)]
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    file = None
    if keeps:
        with suppress(OSError, PhikitError):  # without them it is a conversation all the same
            file = data_folder() / "lines"
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_completer(None)
        if file is not None:
            with suppress(OSError):
                readline.set_history_length(KEPT_LINES)
                readline.write_history_file(file)
