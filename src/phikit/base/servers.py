"""The servers that run on this machine, each known by a small file while it lives.

A server announces itself; `phikit ps` lists what is announced and asks each for what it holds. A
server that was killed leaves its file behind, so an entry counts only while its process lives.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from phikit.base.errors import StorageError
from phikit.base.files import write_atomic
from phikit.base.places import cache_folder


class Server(NamedTuple):
    """A running server."""

    pid: int
    url: str
    """Where it answers, without a path: "http://127.0.0.1:8000"."""
    models: list[str]
    """What it serves, by the names that requests use."""
    started: float
    """Seconds since the epoch."""


@contextmanager
def announced(url: str, models: Sequence[str]) -> Iterator[None]:
    """Let `running` know of this process's server as long as the block lasts.

    A server whose files cannot be written runs all the same, unlisted.
    """
    record = Server(os.getpid(), url, list(models), time.time())
    file = None
    with suppress(StorageError, OSError):
        folder = _folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        file = folder / f"{record.pid}.json"
        write_atomic(file, json.dumps(record._asdict()) + "\n")
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                file.unlink()


def running() -> list[Server]:
    """The announced servers whose processes live, oldest first; files of dead ones are removed."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        try:
            server = Server(**json.loads(file.read_text(encoding="utf-8")))
            lives = _lives(int(server.pid))
        except (OSError, ValueError, TypeError):
            lives = False
        if lives:
            found.append(server)
        else:
            with suppress(OSError):
                file.unlink()
    return sorted(found, key=lambda server: server.started)


def _folder() -> Path:
    return cache_folder() / "servers"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks without sending
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
