"""Files that survive a crash: written under another name, flushed to the disk, then renamed."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError

from phikit.base.errors import StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "no permission" and "no such place" into a StorageError that names `path`.

    safetensors reports the operating system's error only inside its message, so that is read too.
    Every other error passes through unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number in _NO_SPACE:
            raise StorageError(
                f"the disk is full: cannot write {path}",
                fix="free some space, or choose another folder, then resume the run",
            ) from error
        if number in _NO_ACCESS:
            raise StorageError(
                f"not allowed to write {path}", fix="choose a folder you may write to"
            ) from error
        if isinstance(error, OSError) and _is_no_place(error, path):
            raise StorageError(
                f"cannot write {path}: {error.strerror}", fix="choose another folder"
            ) from error
        raise


def _number_in(message: str) -> int | None:
    """The errno in a message of safetensors, which words it by version in two ways."""
    found = re.search(r"(?:code: |os error )(\d+)", message)
    return int(found[1]) if found else None


def _is_no_place(error: OSError, path: Path) -> bool:
    """Whether nothing can be created at `path`; a missing file beside it is no such error."""
    if error.errno == errno.ENOENT:
        return error.filename == str(path) or not path.parent.exists()
    return error.errno in _NO_PLACE


def read_exactly(file: FileIO, into: memoryview) -> None:
    """Read as many bytes as `into` holds; EOFError if the file has fewer."""
    while into.nbytes:
        count = file.readinto(into)
        if not count:
            raise EOFError("the file ends early")
        into = into[count:]


def fsync_folder(path: Path) -> None:
    """Make the names inside a folder durable (POSIX wants this after a create or a rename)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; at the end of the block it takes the place of `path`.

    If the block fails, the temporary file is removed and `path` is as it was.

    Raises:
        StorageError: the disk is full or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new, never a part.

    Raises:
        StorageError: the disk is full or the folder may not be written.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with storage_errors(path):
        fsync_folder(path.parent)
