"""One line of JSON for each routed request: what was decided and why, tokens, cost and seconds.

No text of a conversation is in it, and no key.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from phikit.base.files import storage_errors

Route = Literal["local", "cloud"]
Reason = Literal["absent", "context", "failure", "unsure"]


@dataclass(slots=True)
class Entry:
    """A line while the request is under way."""

    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    route: Route | None = None
    """None if no side has answered."""
    reason: Reason | None = None
    """Why the local model's answer did not do; None if it did."""
    confidence: float | None = None
    threshold: float | None = None
    local_tokens: int = 0
    """Sampled here, all replies together."""
    cloud_tokens_in: int = 0
    cloud_tokens_out: int = 0
    cost: float = 0.0
    local_s: float = 0.0
    seconds: float = 0.0
    note: str | None = None
    error: str | None = None
    """Why there is no whole reply; "GeneratorExit" if its reader left."""


class RouteLog:
    """Appends to a file; without a path it writes nothing.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.expanduser()
        self._lock = threading.Lock()
        if self._path is not None:
            with storage_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append(b"")

    @contextmanager
    def request(self) -> Iterator[Entry]:
        """The entry of one request, written when the block ends, however it ends."""
        entry, started = Entry(), time.perf_counter()
        try:
            yield entry
        except BaseException as error:
            entry.error = type(error).__name__
            raise
        finally:
            entry.seconds = round(time.perf_counter() - started, 4)
            values = {name: _plain(value) for name, value in asdict(entry).items()}
            self._append(json.dumps(values).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with self._lock, storage_errors(self._path):
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
