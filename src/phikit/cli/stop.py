"""Stopping and going on: Ctrl-C ends a command with the exact command that continues it."""

import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from phikit.base.errors import Interrupted


def command(arguments: Sequence[str]) -> str:
    """A shell line that runs phikit the way this process was started."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "phikit.cli", *arguments])
    found = shutil.which("phikit")
    on_path = found is not None and script.exists() and Path(found).samefile(script)
    return shlex.join(["phikit" if on_path else str(script), *arguments])


@contextmanager
def stoppable(*, kept: str) -> Iterator[None]:
    """Raise Interrupted on Ctrl-C, with what is kept and the command that goes on from there.

    SIGTERM, which schedulers send, counts as Ctrl-C: nothing is left half written.
    """
    go_on = f"go on with the same command: {command(sys.argv[1:])}"
    try:
        with _terminable():
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {kept}", fix=go_on) from None
    except Interrupted as stop:
        raise Interrupted(stop.what, fix=go_on) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does at that moment; training, for one, ends its step first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C would do now, also where it is ignored, as in a shell's background."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(number, frame)
