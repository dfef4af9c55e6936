"""What a checkpoint is, read from its configuration and the headers of its files alone.

No weight is loaded: a model of 40 billion parameters is described in a second, on any machine.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from phikit.base.errors import ChatError, WeightsError
from phikit.chat.render import Renderer
from phikit.chat.tokenizer import Tokenizer
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.registry import build
from phikit.nn.quantised import PackedWeight, QuantConfig
from phikit.weights.adapter import CONFIG as ADAPTER_CONFIG
from phikit.weights.adapter import TENSORS as ADAPTER_TENSORS
from phikit.weights.build import named_tensors
from phikit.weights.gguf import GGUFFile
from phikit.weights.load import (
    find,
    folder_renderer,
    gguf_renderer,
    read_config,
    read_json,
    read_quantisation,
)
from phikit.weights.quantised import put_empty
from phikit.weights.safetensors_files import open_file, open_folder
from phikit.weights.surgery import saved_modalities, saved_parameters

BLOCK = 32
"""Weights that share one 16-bit scale in Q8_0 and Q4_0."""


class Adapter(NamedTuple):
    """A low-rank adapter beside or inside a checkpoint."""

    name: str
    rank: int
    alpha: float | None
    targets: tuple[str, ...]
    parameters: int


class Sense(NamedTuple):
    """What a model perceives beside text."""

    name: str
    has_adapter: bool
    parameters: int | None
    """Of encoder and projector; None for one that the model is born with: they are its own."""


class Stored(NamedTuple):
    """What lies in the files."""

    layout: str
    """"Hugging Face", "phikit" for packed weights, or "GGUF"."""
    dtype: str
    """That of the embeddings, or the quantisation of a GGUF file."""
    files: int
    size: int
    """Bytes of all files with weights."""
    tensors: int


class Packed(NamedTuple):
    """The quantised part of a checkpoint, and what is in floating point beside it."""

    config: QuantConfig
    weights: int
    size: int
    """Bytes of the packed weights and their scales."""
    kept: Mapping[str, int]
    """Numbers in floating point, by the name of their layer or encoder."""


class Description(NamedTuple):
    """A checkpoint, without its weights."""

    path: Path
    config: DecoderConfig
    stored: Stored
    tokenizer: Tokenizer | None
    renderer: Renderer | None
    renderer_fault: str | None
    """Why there is no renderer, or no tokenizer."""
    adapters: tuple[Adapter, ...]
    senses: tuple[Sense, ...] = ()
    packed: Packed | None = None


class Memory(NamedTuple):
    """Bytes of the weights by precision."""

    bf16: int
    int8: int
    int4: int


def describe(path: str | Path) -> Description:
    """Describe a model folder, a `.gguf` file or "smollm2".

    Raises:
        WeightsError: nothing is there, or it is damaged.
        ConfigError: the model is of another family.
        MissingExtraError: reading this needs a package that is not installed.
    """
    where = find(path)
    if where.is_file():
        return _describe_gguf(where)
    config, quantisation = read_config(where), read_quantisation(where)
    with open_folder(where) as source:
        weights = sorted(where.glob("model*.safetensors"))
        dtype = str(source.stored_dtype()).removeprefix("torch.")
        size = sum(file.stat().st_size for file in weights)
        layout = "Hugging Face" if quantisation is None else "phikit"
        stored = Stored(layout, dtype, len(weights), size, len(source.shapes))
        inside = _adapters_inside(source.shapes, config)
    tokenizer = renderer = fault = None
    try:
        tokenizer = Tokenizer.load(where)
        renderer = folder_renderer(where, tokenizer)
    except ChatError as error:
        fault = error.what
    beside = [describe_adapter(file.parent) for file in sorted(where.glob(f"*/{ADAPTER_CONFIG}"))]
    packed = None if quantisation is None else describe_packed(config, quantisation)
    adapters = (*inside, *beside)
    senses = _senses(where, config)
    return Description(where, config, stored, tokenizer, renderer, fault, adapters, senses, packed)


def _senses(folder: Path, config: DecoderConfig) -> tuple[Sense, ...]:
    """Those that the model is born with, then those that were attached."""
    born = [Sense(name, name in config.adapters, None) for name in config.senses]
    attached = [
        Sense(modality.name, modality.adapter is not None, saved_parameters(folder, modality.name))
        for _, modality in saved_modalities(folder)
    ]
    return (*born, *attached)


def describe_packed(config: DecoderConfig, quantisation: QuantConfig) -> Packed:
    """What a model of this config holds once it is quantised like this."""
    with torch.device("meta"):
        model = build(config)
    put_empty(model, quantisation)
    packed = {part for part in model.modules() if isinstance(part, PackedWeight)}
    kept: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        top = name.partition(".")[0]
        part = name.rsplit(".", 2)[-2] if top in ("model", "lm_head") else top
        kept[part] = kept.get(part, 0) + parameter.numel()
    return Packed(
        quantisation,
        weights=sum(part.shape.numel() for part in packed),
        size=sum(part.packed.nbytes + part.scales.nbytes for part in packed),
        kept=kept,
    )


def weight_bytes(model: Decoder) -> int:
    """Bytes that a model's weights take in memory."""
    return sum(tensor.nbytes for _, tensor in named_tensors(model))


def describe_adapter(folder: Path) -> Adapter:
    """Describe an adapter in PEFT's layout.

    Raises:
        WeightsError: the folder holds none, or it is damaged.
    """
    values = read_json(folder / ADAPTER_CONFIG)
    if values is None:
        raise WeightsError(f"{folder / ADAPTER_CONFIG} does not exist", fix="point at an adapter")
    with open_file(folder / ADAPTER_TENSORS) as source:
        parameters = sum(map(math.prod, source.shapes.values()))
    targets = values.get("target_modules") or ()
    return Adapter(
        name=folder.name,
        rank=int(values.get("r", 0)),
        alpha=values.get("lora_alpha"),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        parameters=parameters,
    )


def weight_memory(config: DecoderConfig) -> Memory:
    """Bytes of all weights at 16, 8 and 4 bits.

    As Q8_0 and Q4_0 of llama.cpp count: matrices with one 16-bit scale for every `BLOCK` weights;
    norms and biases stay at 16 bits.
    """
    matrices = vectors = 0
    with torch.device("meta"):
        for parameter in build(config).parameters():
            if parameter.ndim > 1:
                matrices += parameter.numel()
            else:
                vectors += parameter.numel()
    scales = matrices // BLOCK
    sizes = (bits * matrices // 8 + 2 * scales + 2 * vectors for bits in (8, 4))
    return Memory(2 * (matrices + vectors), *sizes)


def cache_bytes_per_token(config: DecoderConfig) -> int:
    """Bytes of keys and values that one token of context takes at 16 bits."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _describe_gguf(path: Path) -> Description:
    source = GGUFFile(path)
    stored = Stored("GGUF", gguf_quantisation(source), 1, path.stat().st_size, len(source.shapes))
    tokenizer = renderer = fault = None
    try:
        tokenizer = source.tokenizer()
        renderer = gguf_renderer(source, tokenizer)
    except ChatError as error:
        fault = error.what
    return Description(path, source.config, stored, tokenizer, renderer, fault, ())


def gguf_quantisation(source: GGUFFile) -> str:
    """What a file says about its weights: "BF16", "Q4_0", "Q4_K_M"."""
    import gguf

    number = source.metadata.get("general.file_type")
    try:
        return gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown quantisation"


def _adapters_inside(shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> list[Adapter]:
    """Adapters among the tensors of a model, as Phi-4-multimodal keeps its two."""
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        found = re.fullmatch(r".*?(\w+)\.lora_[AB]\.(\w+)\.weight", name)
        if found:
            parts.setdefault(found[2], []).append((found[1], shape))
    alphas = {name: shape.alpha for name, shape in config.adapters.items()}
    return [
        Adapter(
            name=name,
            rank=min(min(shape) for _, shape in found),
            alpha=alphas.get(name),
            targets=tuple(sorted({target for target, _ in found})),
            parameters=sum(math.prod(shape) for _, shape in found),
        )
        for name, found in parts.items()
    ]
