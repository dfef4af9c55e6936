"""Where a command puts what it makes: whole or not at all, and never over something else."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phikit.base.errors import StorageError
from phikit.base.files import fsync_folder, storage_errors


@contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it becomes `out` when all went well, else nothing.

    Raises:
        StorageError: `out` is there already, or cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise StorageError(
            f"{out} is there already, and nothing is overwritten",
            fix="choose another place, or remove it first",
        )
    temporary = out.with_name(f".{out.name}.part")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
    try:
        yield temporary
        with storage_errors(out):
            if out.is_dir():
                out.rmdir()
            temporary.replace(out)
            fsync_folder(out.parent)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
