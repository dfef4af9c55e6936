"""GGUF files of dense models: llama.cpp's format, weights and tokenizer in one file.

`gguf` turns the quantised blocks into numbers; the tensors come out under Hugging Face's names,
with its order of rows, a few rows at a time. Nothing stays mapped into memory.
"""

import math
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phikit.base.errors import MissingExtraError, WeightsError
from phikit.base.files import read_exactly
from phikit.chat.tokenizer import Tokenizer
from phikit.weights.build import EMBEDDING, fill
from phikit.weights.gguf_header import Entry, damaged, read_header
from phikit.weights.gguf_layout import (
    LONG_FACTORS,
    SHORT_FACTORS,
    Factors,
    hf_name,
    is_permuted,
    pairs_to_halves,
    read_config,
)
from phikit.weights.gguf_tokenizer import read_tokenizer

RENDERER_KEY = "phikit.renderer"
"""Where our own files name the renderer; other programs ignore it."""
_BLOCK_NUMBERS = 1 << 20  # turned into float32 at once


class _Place(NamedTuple):
    """A tensor as the `gguf` package sees it."""

    kind: Any
    """`gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    row_bytes: int
    start: int


class GGUFFile:
    """A TensorSource over one GGUF file.

    Attributes:
        metadata: key to value; arrays of numbers are numpy arrays, arrays of text are lists.
        config: the architecture that the metadata describes.

    Raises:
        WeightsError: the file is damaged, or of another architecture.
        MissingExtraError: the `gguf` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = import_gguf()
        self._path, self.where = path, str(path)
        header = read_header(path)
        self.metadata = header.metadata
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise WeightsError(
                f"{path} is one of {parts} parts", fix="join them with: llama-gguf-split --merge"
            )
        architecture = str(self.metadata.get("general.architecture"))
        places = {
            name: self._place(name, e, header.file_bytes) for name, e in header.entries.items()
        }
        factors = self._read_factors(places)
        self._places = {hf_name(name, architecture): place for name, place in places.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: place.shape for name, place in self._places.items()
        }
        readable = {kind: self._is_readable(kind) for kind in {p.kind for p in places.values()}}
        self.unreadable: Mapping[str, str] = {
            name: place.kind.name
            for name, place in self._places.items()
            if not readable[place.kind]
        }
        self.config = read_config(
            self.metadata, shapes=self.shapes, factors=factors, where=self.where
        )

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The numbers of one tensor in row-major order, whole rows at a time, each block flat."""
        place = self._places[name]
        *outer, columns = place.shape
        rows, heads = math.prod(outer), self.config.head_dim
        permuted = is_permuted(name, self.config.layout)
        step = max(1, _BLOCK_NUMBERS // max(1, columns))
        if permuted:
            step = max(heads, step // heads * heads)
        try:
            with FileIO(self._path) as file:
                file.seek(place.start)
                for first in range(0, rows, step):
                    count = min(step, rows - first)
                    raw = np.empty(count * place.row_bytes, np.uint8)
                    read_exactly(file, raw.data)
                    values = self._numbers(raw.reshape(count, place.row_bytes), place.kind)
                    yield (pairs_to_halves(values, heads) if permuted else values).reshape(-1)
        except (OSError, EOFError) as error:
            raise WeightsError(f"{self.where} cannot be read: {error}") from error

    def read(self, name: str) -> Tensor:
        """One tensor with Hugging Face's order of rows, in float32 if it is quantised."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=self._dtype(place.kind))
        fill(tensor, self.blocks(name))
        return tensor

    def stored_dtype(self) -> torch.dtype:
        """That of the embeddings; float32 if they are quantised."""
        return self._dtype(self._places[EMBEDDING].kind)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside the file."""
        return read_tokenizer(self.metadata, where=self.where)

    def _dtype(self, kind: Any) -> torch.dtype:
        halves = {"F16": torch.float16, "BF16": torch.bfloat16}
        return halves.get(kind.name, torch.float32)

    def _numbers(self, raw: np.ndarray, kind: Any) -> Tensor:
        """Rows of bytes as rows of numbers."""
        if kind.name in ("F32", "F16", "BF16"):
            return torch.from_numpy(raw).view(self._dtype(kind))
        with np.errstate(all="ignore"):  # a scale may be infinite, in a damaged file
            return torch.from_numpy(self._gguf.dequantize(raw, kind))

    def _is_readable(self, kind: Any) -> bool:
        _, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        try:
            self._gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def _place(self, name: str, entry: Entry, file_bytes: int) -> _Place:
        try:
            kind = self._gguf.GGMLQuantizationType(entry.kind)
            *outer, row_bytes = self._gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
        except (ValueError, KeyError) as error:
            raise damaged(self.where, f"{name}: {error}") from error
        end = entry.start + math.prod(outer) * row_bytes
        if end > file_bytes:  # a size beyond the file must not become a size in memory
            raise damaged(self.where, f"{name} ends at byte {end} of {file_bytes}")
        return _Place(kind, entry.shape, row_bytes, entry.start)

    def _read_factors(self, places: dict[str, _Place]) -> Factors | None:
        """LongRoPE's factors, which are part of the configuration and no weights."""
        found = [places.pop(name, None) for name in (SHORT_FACTORS, LONG_FACTORS)]
        if found == [None, None]:
            return None
        lists = []
        for place in found:
            if place is None or place.kind.name != "F32" or len(place.shape) != 1:
                raise damaged(self.where, "its LongRoPE factors are no two lists of numbers")
            raw = np.empty(place.row_bytes, np.uint8)
            with FileIO(self._path) as file:
                file.seek(place.start)
                read_exactly(file, raw.data)
            lists.append(raw.view("<f4").tolist())
        return Factors(*lists)


def import_gguf() -> ModuleType:
    """The `gguf` package; MissingExtraError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    return gguf
