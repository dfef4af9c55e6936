"""Tensors of a Hugging Face folder: `model.safetensors`, whole or in shards with an index.

safetensors holds numbers and nothing that runs. Pickled checkpoints (`pytorch_model.bin`) can run
code when opened, so they are recognised and refused, whatever name they bear.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.weights.build import EMBEDDING

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16", "F64")


class SafetensorsFiles:
    """A TensorSource over open files; a context manager that closes them.

    Args:
        where: the folder or file, for messages.
        files: path to the names of the tensors wanted from it; None wants all.

    Raises:
        WeightsError: a file is missing, damaged, cut short, or a pickle.
    """

    def __init__(self, where: Path, files: Mapping[Path, set[str] | None]) -> None:
        self.where = str(where)
        self._handles: list[Any] = []
        self._handle_of: dict[str, Any] = {}
        for path, names in files.items():
            handle = _open(path)
            self._handles.append(handle)
            found = [n for n in handle.keys() if names is None or n in names]  # noqa: SIM118
            self._handle_of |= dict.fromkeys(found, handle)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: self._shape(name) for name in self._handle_of
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        part = self._handle_of[name].get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise WeightsError(
                f"{self.where} keeps {name} as {part.get_dtype()}; known are {', '.join(_FLOATS)}",
                fix="convert the checkpoint to bfloat16",
            )
        return tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, as a view of the mapped file: copy what is to outlive the file."""
        return self._handle_of[name].get_tensor(name)

    def stored_dtype(self) -> torch.dtype:
        """That of the embeddings."""
        return self.read(EMBEDDING).dtype

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.__exit__(kind, error, trace)


def open_file(path: Path) -> SafetensorsFiles:
    """All tensors of one safetensors file."""
    return SafetensorsFiles(path, {path: None})


def open_folder(folder: Path) -> SafetensorsFiles:
    """The tensors of a model folder, in one file or in shards.

    Raises:
        WeightsError: there are no weights, or they cannot be read, or the index is unsound.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return SafetensorsFiles(folder, {folder / SINGLE: None})
    names_in: dict[Path, set[str] | None] = {}
    for name, file in _read_index(index).items():
        names = names_in.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return SafetensorsFiles(folder, names_in)


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index, tensor to file; every file lies in the index's own folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = dict(weight_map)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not an index of weights: {error!r}") from error
    for file in files.values():
        # Lexical on purpose: in a hub cache the files inside are links to elsewhere.
        inside = isinstance(file, str) and file not in ("", ".", "..")
        if not inside or file != PurePosixPath(file).name or file != PureWindowsPath(file).name:
            raise WeightsError(
                f"{path} points outside of its folder: {file!r}",
                fix="fetch the checkpoint again, from a source you trust",
            )
    return files


def _open(path: Path) -> Any:
    """A `safe_open` handle, after a look at the first bytes for what it is not."""
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*.bin"))
        if pickles:
            raise WeightsError(
                f"{path} does not exist, only {pickles[0]}, a pickle, which can run code",
                fix="convert the checkpoint to safetensors where you trust it",
            )
        raise WeightsError(f"{path} does not exist", fix="point at a folder with safetensors")
    try:
        _check_start(path)
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or cut short: {error}", fix="copy or download it again"
        ) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise WeightsError(
            f"{path} is a pickle under the name of safetensors, and a pickle can run code",
            fix="convert the checkpoint to safetensors where you trust it",
        )
    if start.startswith(b"version "):
        raise WeightsError(
            f"{path} is a git-lfs pointer, not the file itself", fix="run: git lfs pull"
        )
    if len(start) < 8 or struct.unpack("<Q", start)[0] > size - 8:
        raise WeightsError(
            f"{path} is damaged or cut short: its header is longer than its {size} bytes",
            fix="copy or download it again",
        )
