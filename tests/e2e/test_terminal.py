"""`phikit chat` at a terminal: a prompt, replies as they come, Ctrl-C stops a reply and no more."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0


def _hear_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A process whose input and output are one end of a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "phikit.cli", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` appears, and on from behind it the next time."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._unread:
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not appear in {self._unread!r}"
            self._unread += os.read(self._ours, 4096).decode(errors="replace")
        self._unread = self._unread.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(random_model: Callable[[int], Path]) -> Iterator[Terminal]:
    """A conversation with a model of random weights, which repeats itself without end."""
    model = str(random_model(4096))
    opened = Terminal("chat", model, "--max-new-tokens", "4000", "--temperature", "0")
    yield opened
    opened.close()


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on(terminal: Terminal):
    terminal.wait_for("/help for commands")
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("\n")
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    time.sleep(0.5)  # readline misses a signal between printing its prompt and waiting for a key
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("/quit leaves")
    terminal.wait_for("> ")
    terminal.type("/think \\\n")
    terminal.wait_for(". ")
    terminal.type("maybe\n")
    terminal.wait_for("neither on nor off")
    terminal.type("/quit\n")
    assert terminal.process.wait(PATIENCE_S) == 0


def test_the_end_of_input_leaves(terminal: Terminal):
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(PATIENCE_S) == 0
