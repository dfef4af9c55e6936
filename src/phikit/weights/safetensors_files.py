"""safetensors: the tensors of a Hugging Face folder, in one file or in shards with an index.

A file is a length in 8 bytes, a JSON header, then plain numbers: nothing in it runs. It is read and
written here, not by the `safetensors` package: that maps files into memory, and the pages of a
mapped file count as the process's own until it is closed, so loading took twice the model's bytes;
its writer wants every tensor of a file at once. Reads go through one small block instead. Whatever
the header says is checked against the file before it is used.

Pickled checkpoints (`pytorch_model.bin`) can run code when opened, so they are recognised and
refused, whatever name they bear.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.base.files import read_exactly, replacing
from phikit.weights.build import BYTES, EMBEDDING, fill
from phikit.weights.quantised import is_packed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 4 << 20
"""Read at once; larger blocks are no faster (they leave the processor's cache)."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_MAX_DIMENSIONS = 64  # that of torch
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    BYTES: torch.uint8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    """Where a tensor lies: the bytes from `start` to `stop` of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


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
        self._files: list[FileIO] = []
        self._entries: dict[str, tuple[FileIO, _Entry]] = {}
        try:
            for path, names in files.items():
                file = _open(path)
                self._files.append(file)
                for name, entry in _read_header(file, path).items():
                    if names is None or name in names:
                        self._entries[name] = file, entry
        except BaseException:
            self.close()
            raise
        self.shapes = {name: entry.shape for name, (_, entry) in self._entries.items()}
        self.unreadable = {
            name: entry.dtype
            for name, (_, entry) in self._entries.items()
            if entry.dtype not in _DTYPES or entry.dtype == BYTES
        }
        self._block = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The numbers of one tensor in row-major order, block by block, each flat.

        The next block, of whatever tensor, takes the memory of the one before.
        """
        file, entry = self._entries[name]
        for start in range(entry.start, entry.stop, BLOCK_BYTES):
            block = self._block[: min(BLOCK_BYTES, entry.stop - start)]
            try:
                file.seek(start)
                read_exactly(file, block.numpy().data)
            except (OSError, EOFError) as error:
                raise WeightsError(f"{file.name} cannot be read: {error}") from error
            yield block.view(_DTYPES[entry.dtype])

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        _, entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        fill(tensor, self.blocks(name))
        return tensor

    def stored_dtype(self) -> torch.dtype:
        """That of the embeddings, or of any other weight where they are packed.

        Raises WeightsError if there are none.
        """
        plain = [
            name for name in self.shapes if name not in self.unreadable and not is_packed(name)
        ]
        name = plain[0] if plain and f"{EMBEDDING}.packed" in self.shapes else EMBEDDING
        if name not in plain:
            raise WeightsError(f"{self.where} has no {EMBEDDING} in floating point")
        return _DTYPES[self._entries[name][1].dtype]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[Tensor], None] | None = None,
) -> None:
    """Write one file under another name, then rename it; `dtype` as in `dtype_in_file`.

    Copies one tensor at a time, and none that is contiguous, on the CPU and of the right dtype;
    `on_tensor` is called after each.

    Raises:
        StorageError: the disk is full or the folder may not be written.
    """
    # Widest numbers first: then every tensor starts at a multiple of its numbers' size.
    kept = {name: dtype_in_file(name, tensor, dtype) for name, tensor in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: -kept[item[0]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * kept[name].itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": _CODES[kept[name]], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            flat = tensor.detach().to("cpu", kept[name]).reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
            if on_tensor is not None:
                on_tensor(tensor)


def dtype_in_file(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for; the tensor's own where that is None, and always for packed weights."""
    return tensor.dtype if dtype is None or is_packed(name) else dtype


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index, tensor to file; every file lies in the index's own folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = dict(weight_map)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} is not an index of weights: {error!r}") from error
    for file in files.values():
        # Lexical on purpose: in a hub cache the files inside are links to elsewhere.
        inside = isinstance(file, str) and file not in ("", ".", "..") and "\0" not in file
        if not inside or file != PurePosixPath(file).name or file != PureWindowsPath(file).name:
            raise WeightsError(
                f"{path} points outside of its folder: {file!r}",
                fix="fetch the checkpoint again, from a source you trust",
            )
    return files


def _open(path: Path) -> FileIO:
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*.bin"))
        if pickles:
            raise WeightsError(
                f"{path} does not exist, only {pickles[0]}, a pickle, which can run code",
                fix="convert the checkpoint to safetensors where you trust it",
            )
        raise WeightsError(f"{path} does not exist", fix="point at a folder with safetensors")
    try:
        return FileIO(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _read_header(file: FileIO, path: Path) -> dict[str, _Entry]:
    """The tensors of a file; they lie one behind the other, from the header to the end."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    if start[8:] != b"{":  # lengths such as 896, in bytes, begin like a pickle
        _refuse_other_formats(start, path)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > size - 8:
        raise _damaged(path, f"its header is longer than its {size} bytes")
    if length > _MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} bytes")
    file.seek(8)
    try:
        text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_without_doubles)
        del header["__metadata__"]
    except KeyError:
        pass
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    entries = {name: _entry(name, about, 8 + length, path) for name, about in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise _damaged(path, f"{name} starts at byte {entry.start}, expected at {end}")
        end = entry.stop
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end} of {size}")
    return entries


def _entry(name: str, about: Any, data_start: int, path: Path) -> _Entry:
    try:
        dtype, shape, (start, stop) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header does not say where {name} lies") from error
    sizes_are_sound = len(shape) <= _MAX_DIMENSIONS and all(
        type(size) is int and 0 <= size < 1 << 63 for size in (*shape, start, stop)
    )
    if not sizes_are_sound or start > stop or not isinstance(dtype, str):
        raise _damaged(path, f"{name} is said to be {dtype!r} in bytes {start} to {stop}")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != stop - start:
        raise _damaged(path, f"{name} has {stop - start} bytes for {dtype} {list(shape)}")
    return _Entry(dtype, shape, data_start + start, data_start + stop)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice")
    return values


def _refuse_other_formats(start: bytes, path: Path) -> None:
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise WeightsError(
            f"{path} is a pickle under the name of safetensors, and a pickle can run code",
            fix="convert the checkpoint to safetensors where you trust it",
        )
    if start.startswith(b"version "):
        raise WeightsError(
            f"{path} is a git-lfs pointer, not the file itself", fix="run: git lfs pull"
        )


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path} is damaged or cut short: {what}", fix="copy or download it again")
