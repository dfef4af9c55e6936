"""The header of a GGUF file: metadata, and where each tensor lies.

It is read here, not by the `gguf` package, whose reader makes one numpy array for every vocabulary
entry (2.7 s for SmolLM2, here 0.1 s) and follows the lengths of a damaged file wherever they lead.
Here every length is checked against the file before it is used, so memory and time are bounded by
the file's size.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phikit.base.errors import WeightsError

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20


class Entry(NamedTuple):
    """Where a tensor lies."""

    kind: int
    """Its quantisation, as a number of `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    start: int
    """The byte of the file it starts at."""


class Header(NamedTuple):
    metadata: dict[str, Any]
    """Arrays of numbers are numpy arrays, arrays of text are lists."""
    entries: dict[str, Entry]
    file_bytes: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file of version 2 or 3.

    Raises:
        WeightsError: the file cannot be read, or is something else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
                raise WeightsError(f"{path} is empty", fix="copy or download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content, where=str(path)).read()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def damaged(where: str, what: str) -> WeightsError:
    return WeightsError(f"{where} is damaged: {what}", fix="copy or download it again")


class _Reader:
    """Walks through the bytes once."""

    def __init__(self, content: mmap.mmap, *, where: str) -> None:
        self._content, self._where, self._at = content, where, 0

    def read(self) -> Header:
        if self._content[:4] != b"GGUF":
            raise WeightsError(f"{self._where} is not a GGUF file", fix="check the path")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise WeightsError(f"{self._where} is of GGUF version {version}; known are 2 and 3")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            if key in metadata:
                raise self._damaged(f"{key!r} stands twice")
            metadata[key] = self._value(self._scalar("I"))
        entries: dict[str, Entry] = {}
        for _ in range(tensors):
            name = self._text()
            if name in entries:
                raise self._damaged(f"the tensor {name!r} stands twice")
            entries[name] = self._entry()
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise self._damaged(f"general.alignment is {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        placed = {n: e._replace(start=data_start + e.start) for n, e in entries.items()}
        return Header(metadata, placed, len(self._content))

    def _entry(self) -> Entry:
        """An entry whose start is counted from that of the data section."""
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"a tensor has {dimensions} dimensions")
        innermost_first = [self._scalar("Q") for _ in range(dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        return Entry(kind, tuple(reversed(innermost_first)), offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._scalar("I"), self._scalar("Q")
            if item == _STRING:
                return [self._text() for _ in range(count)]
            if item in _SCALARS:
                numbers = np.dtype(_SCALARS[item]).newbyteorder("<")
                return np.frombuffer(self._take(count * numbers.itemsize), numbers)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise self._damaged(f"a value is of the unknown type {kind}")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        raw = self._take(self._scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"text that is not UTF-8 near byte {self._at}") from error

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._content):
            raise self._damaged(f"something ends at byte {end} of {len(self._content)}")
        raw = self._content[self._at : end]
        self._at = end
        return raw

    def _damaged(self, what: str) -> WeightsError:
        return damaged(self._where, what)
