"""Checkpoints that are whole or absent.

A checkpoint is written as `step-N.tmp`, gets a manifest with the size and sha256 of every file,
is flushed to the disk, and only then renamed to `step-N`. Whatever moment the power fails at, the
newest `step-N` is complete; older ones are pruned after the rename, never before.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from phikit.base.errors import CheckpointError
from phikit.base.files import fsync_folder, storage_errors

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], *, keep: int = 1
) -> Path:
    """Save one checkpoint and prune the older ones.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimiser steps done.
        write: fills the empty folder it is given.
        keep: how many checkpoints up to and including this one remain.

    Raises:
        StorageError: the disk is full; earlier checkpoints are untouched.
    """
    assert keep >= 1, keep
    folder = Path(folder)
    final = folder / f"step-{step}"
    temporary = folder / f"step-{step}.tmp"
    with storage_errors(final):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("step-*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir()
        try:
            write(temporary)
            _seal(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():  # a resumed run saving its own step again: a folder cannot be replaced
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(folder)
    for older in [path for number, path in _steps(folder) if number <= step][:-keep]:
        shutil.rmtree(older)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Unfinished `*.tmp` do not count."""
    steps = _steps(Path(folder))
    return steps[-1][1] if steps else None


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing or differs; names the file and both hashes.
    """
    path = Path(path)
    fix = f"delete {path} to fall back on the checkpoint before it"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is missing or unreadable", fix=fix) from error
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the manifest lists it", fix=fix)
        found = _sha256(file)
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{file} is damaged: sha256 is {found} ({file.stat().st_size} bytes), "
                f"the manifest says {entry['sha256']} ({entry['bytes']} bytes)",
                fix=fix,
            )


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("step-*"):
        name = re.fullmatch(r"step-(\d+)", path.name)
        if name and (path / MANIFEST).is_file():
            found.append((int(name[1]), path))
    return sorted(found)


def _seal(folder: Path) -> None:
    """Write the manifest and flush every file and folder to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {
            "sha256": _sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": listing}, indent=2) + "\n", encoding="utf-8")
    for path in [*files, manifest]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in [*(inner for inner in folder.rglob("*") if inner.is_dir()), folder]:
        fsync_folder(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
