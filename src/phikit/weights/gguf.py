"""GGUF files of Llama-shaped models: llama.cpp's format, weights and tokenizer in one file.

The header is read here, not by the `gguf` package, whose reader makes one numpy array for every
vocabulary entry (2.7 s for SmolLM2, here 0.1 s) and follows the lengths of a damaged file wherever
they lead. Every length is checked against the file before it is used. `gguf` turns the quantised
blocks into numbers. llama.cpp rotates channel pairs (2i, 2i + 1), Hugging Face (i, i + H/2), so its
converter permutes the rows of q and k, and `read` permutes them back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `LlamaModel.permute` in
llama.cpp's `convert_hf_to_gguf.py`.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from phikit.base.errors import ChatError, MissingExtraError, WeightsError
from phikit.chat.tokenizer import Tokenizer
from phikit.models.dense import DenseConfig

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_CONTROL = 3  # `tokenizer.ggml.token_type` of special tokens
_MAX_DIMENSIONS = 4

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Entry(NamedTuple):
    """Where a tensor lies."""

    kind: int
    """Its quantisation, as a number of `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the data section."""


class GGUFFile:
    """A TensorSource over one GGUF file, which stays mapped into memory while this lives.

    Attributes:
        metadata: key to value; arrays of numbers are numpy arrays, arrays of text are lists.
        config: the architecture that the metadata describes.

    Raises:
        WeightsError: the file is damaged, or of another architecture.
        MissingExtraError: the `gguf` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtraError("gguf", "gguf") from error
        self._gguf = gguf
        self.where = str(path)
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise WeightsError(f"{path} is empty", fix="copy or download it again") from error
        header = _Header(self._map, where=self.where)
        self.metadata = header.metadata
        self._data_start = header.data_start
        self._entries = {_hf_name(name): entry for name, entry in header.entries.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in self._entries.items()
        }
        for name in self._entries:
            self._place(name)  # a size beyond the file must not become a size in memory
        self.config = self._read_config()

    def read(self, name: str) -> Tensor:
        """One tensor in float32, with Hugging Face's order of rows."""
        kind, byte_shape, start = self._place(name)
        data = np.frombuffer(self._map, np.uint8, math.prod(byte_shape), start).reshape(byte_shape)
        try:
            values = self._gguf.dequantize(data, kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.where} keeps {name} as {kind.name}, which cannot be read here",
                fix="use a file of another quantisation, for example Q8_0",
            ) from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = values.reshape(-1, self.config.head_dim // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        # Norms are stored as float32 and come out as a read-only view of the file.
        return torch.from_numpy(np.array(values, copy=True))

    def _place(self, name: str) -> tuple[Any, tuple[int, ...], int]:
        """A tensor's quantisation, its shape in bytes, and the byte at which it starts."""
        entry = self._entries[name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.kind)
            byte_shape = self._gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
        except ValueError as error:
            raise self._damaged(f"{name}: {error}") from error
        start = self._data_start + entry.offset
        end = start + math.prod(byte_shape)
        if end > len(self._map):
            raise self._damaged(f"{name} ends at byte {end} of {len(self._map)}")
        return kind, byte_shape, start

    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer inside the file."""
        prefix = "tokenizer.ggml."
        kind = self.metadata.get(f"{prefix}model")
        if kind != "gpt2":
            raise ChatError(f"{self.where} has a tokenizer of kind {kind!r}; only 'gpt2' is read")
        tokens, merges, kinds, split = (
            self.metadata.get(prefix + key) for key in ("tokens", "merges", "token_type", "pre")
        )
        if not (
            isinstance(tokens, list)
            and isinstance(merges, list)
            and isinstance(kinds, np.ndarray)
            and len(kinds) == len(tokens)
        ):
            raise self._damaged("the tables of its tokenizer are incomplete")
        special_ids = np.flatnonzero(kinds == _CONTROL).tolist()
        try:
            return Tokenizer.from_parts(
                tokens,
                merges=merges,
                special_ids=special_ids,
                split=split,  # pyright: ignore[reportArgumentType] - checked inside
            )
        except ChatError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for faults in the tables
            raise self._damaged(f"its tokenizer cannot be built: {error}") from error

    def _read_config(self) -> DenseConfig:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise WeightsError(
                f"{self.where} is of the architecture {architecture!r}; only 'llama' is read",
                fix="use the safetensors files of this model",
            )
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise WeightsError(
                f"{self.where} scales its rotary positions ({scaling}), unknown here"
            )
        width, heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self.metadata.get("llama.attention.key_length", width // max(heads, 1))
        if self.metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise WeightsError(f"{self.where} rotates a part of each head, unknown in 'llama'")
        embedding = self.shapes.get("model.embed_tokens.weight", (0,))
        try:
            config = DenseConfig(
                layout="llama",
                vocab_size=embedding[0],
                d_model=width,
                num_layers=self._number("block_count"),
                num_heads=heads,
                num_kv_heads=self.metadata.get("llama.attention.head_count_kv", heads),
                head_dim=head_dim,
                d_mlp=self._number("feed_forward_length"),
                max_context=self._number("context_length"),
                rope_theta=self.metadata.get("llama.rope.freq_base", 10_000.0),
                norm_eps=self.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5),
                tie_embeddings="lm_head.weight" not in self.shapes,
            )
        except ValidationError as error:
            raise self._damaged(f"its metadata describe no model: {error}") from error
        if config.head_dim < 2 or config.head_dim % 2:
            raise self._damaged(f"its heads are {config.head_dim} wide")
        return config

    def _number(self, key: str) -> int:
        value = self.metadata.get(f"llama.{key}")
        if not isinstance(value, int) or value < 1:
            raise self._damaged(f"llama.{key} is {value!r}")
        return value

    def _damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self.where} is damaged: {what}", fix="copy or download it again")


class _Header:
    """Everything before the data section."""

    def __init__(self, content: mmap.mmap, *, where: str) -> None:
        self._content, self._where, self._at = content, where, 0
        if content[:4] != b"GGUF":
            raise WeightsError(f"{where} is not a GGUF file", fix="check the path")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise WeightsError(f"{where} is of GGUF version {version}; known are 2 and 3")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            if key in self.metadata:
                raise self._damaged(f"{key!r} stands twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self.entries: dict[str, _Entry] = {}
        for _ in range(tensors):
            name = self._text()
            if name in self.entries:
                raise self._damaged(f"the tensor {name!r} stands twice")
            self.entries[name] = self._entry()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        self.data_start = -(-self._at // alignment) * alignment

    def _entry(self) -> _Entry:
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"a tensor has {dimensions} dimensions")
        innermost_first = [self._scalar("Q") for _ in range(dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        return _Entry(kind, tuple(reversed(innermost_first)), offset)

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
        return WeightsError(f"{self._where} is damaged: {what}", fix="copy or download it again")


def _hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor; names unknown here stay, to be reported as such."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found and found[2] in _BLOCK_NAMES:
        return f"model.layers.{found[1]}.{_BLOCK_NAMES[found[2]]}.weight"
    return _NAMES.get(name, name)
