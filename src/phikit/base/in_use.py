"""Folders that a process works in, so that no other removes them or writes into them meanwhile.

The mark is a lock of the operating system on the folder itself: no file is left behind, and it goes
with the process, however that ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phikit.base.errors import RunError
from phikit.base.files import storage_errors


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Have a folder for this process as long as the block lasts; it is made if need be.

    Raises:
        RunError: another process has it.
        StorageError: it cannot be made or opened.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process works in {folder}", fix="let it end, or stop it first"
            ) from None
        yield
    finally:
        os.close(handle)
