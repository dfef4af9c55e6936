"""Write a dense model as one GGUF file that llama.cpp runs.

Norms and other vectors stay in float32, as llama.cpp wants. Under "q4_0" the embeddings and the
head are kept in Q8_0, since an error there reaches every token. A matrix whose rows are no multiple
of a quantisation's block of 32 becomes F16. Tensors are quantised and written one at a time.

What the file says beside the weights follows llama.cpp's converter (`conversion/phi.py`, `llama.py`
and `base.py`), except that no token is put before a prompt: our renderers write whole prompts.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.base.files import replacing
from phikit.models.dense import DenseConfig
from phikit.nn.rope import LongRope
from phikit.weights.gguf import RENDERER_KEY, import_gguf
from phikit.weights.gguf_layout import (
    LONG_FACTORS,
    SHORT_FACTORS,
    check_writable,
    gguf_name,
    halves_to_pairs,
    is_permuted,
    write_config,
)
from phikit.weights.gguf_tokenizer import (
    LEFT_KEY,
    RIGHT_KEY,
    Tables,
    is_phi3_vocabulary,
    tables_of,
)
from phikit.weights.load import Loaded
from phikit.weights.save import checkpoint_tensors, refuse_adapters

Quant = Literal["f16", "bf16", "q8_0", "q4_0"]
_BLOCK_NUMBERS = 1 << 20  # quantised at once
_GREATEST = {"F16": 65504, "Q8_0": 65504 * 127, "Q4_0": 65504 * 8}
"""The greatest magnitude a kind keeps; its scales are float16."""


def save_gguf(path: str | Path, loaded: Loaded, *, quant: Quant) -> None:
    """Write weights, tokenizer and chat template to `path`, under another name first.

    Raises:
        WeightsError: the model is of another family, has adapters attached, holds numbers that the
            quantisation cannot keep, or is one that llama.cpp would run otherwise.
        ChatError: llama.cpp has no name for how the tokenizer splits text.
        StorageError: the disk is full or the folder may not be written.
        MissingExtraError: the `gguf` package is not installed.
    """
    gguf, path, config = import_gguf(), Path(path), loaded.config
    if quant not in get_args(Quant):
        raise WeightsError(f"unknown quantisation {quant!r}", fix=f"known: {get_args(Quant)}")
    if type(config) is not DenseConfig:  # a multimodal model is one too, with more to it
        raise WeightsError(
            f"only dense models are written as GGUF, and this has a {type(config).__name__}",
            fix="save it in Hugging Face's layout",
        )
    refuse_adapters(loaded.model)
    check_writable(config)
    tables = tables_of(loaded.tokenizer, rows=config.vocab_size)
    weights = {
        name: (tensor, _kind(gguf, name, tensor, quant))
        for name, tensor in checkpoint_tensors(loaded.model).items()
    }
    for name, (tensor, kind) in weights.items():
        _check_range(name, tensor, kind)

    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, config.layout)
        try:
            _write_about(writer, gguf, loaded, quant=quant)
            write_config(config, writer)
            _write_tokenizer(writer, tables, loaded)
            factors = {} if config.longrope is None else _factors(config.longrope)
            for name, values in factors.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for name, (tensor, kind) in weights.items():
                packed = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
                writer.add_tensor_info(
                    gguf_name(name, config.layout),
                    tensor.shape,
                    np.dtype(np.float32),
                    int(np.prod(packed)),
                    raw_dtype=kind,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in factors.values():
                writer.write_tensor_data(values)
            for name, (tensor, kind) in weights.items():
                if is_permuted(name, config.layout):
                    tensor = halves_to_pairs(tensor, config.head_dim)
                writer.write_tensor_data(_packed(gguf, tensor.to("cpu"), kind))
        finally:
            writer.close()


def _kind(gguf: Any, name: str, tensor: Tensor, quant: Quant) -> Any:
    """The quantisation of one tensor."""
    kinds = gguf.GGMLQuantizationType
    if tensor.ndim == 1:
        return kinds.F32
    kind = kinds[quant.upper()]
    if kind == kinds.Q4_0 and not name.startswith("model.layers."):
        kind = kinds.Q8_0
    block_numbers, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if tensor.shape[-1] % block_numbers else kind


def _check_range(name: str, tensor: Tensor, kind: Any) -> None:
    greatest = _GREATEST.get(kind.name)
    if greatest is not None and not tensor.abs().amax() <= greatest:  # NaN is refused too
        raise WeightsError(
            f"{name} holds {tensor.abs().amax():.3g}, beyond the {greatest:.3g} of {kind.name}",
            fix='write it with quant="bf16"',
        )


def _packed(gguf: Any, tensor: Tensor, kind: Any) -> np.ndarray:
    """The bytes of a tensor under a quantisation, as an array of any shape."""
    if kind.name == "F32":
        return tensor.float().numpy()
    if kind.name == "F16":
        return tensor.half().numpy()
    if kind.name == "BF16":
        return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    packed = np.empty(gguf.quant_shape_to_byte_shape(tensor.shape, kind), np.uint8)
    step = max(1, _BLOCK_NUMBERS // tensor.shape[-1])
    for first in range(0, len(tensor), step):
        rows = slice(first, first + step)
        packed[rows] = gguf.quantize(tensor[rows].float().numpy(), kind)
    return packed


def _factors(longrope: LongRope) -> dict[str, np.ndarray]:
    return {
        LONG_FACTORS: np.array(longrope.long_factor, np.float32),
        SHORT_FACTORS: np.array(longrope.short_factor, np.float32),
    }


def _write_about(writer: Any, gguf: Any, loaded: Loaded, *, quant: Quant) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(RENDERER_KEY, loaded.renderer.name)


def _write_tokenizer(writer: Any, tables: Tables, loaded: Loaded) -> None:
    writer.add_tokenizer_model(tables.model)
    writer.add_tokenizer_pre(tables.split)
    writer.add_token_list(tables.tokens)
    writer.add_token_types(tables.kinds)
    if tables.model == "llama":
        writer.add_token_scores(tables.scores)
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges(tables.merges)
    writer.add_array(LEFT_KEY, tables.left)
    writer.add_array(RIGHT_KEY, tables.right)
    if is_phi3_vocabulary(tables):
        writer.add_name("Phi-3")  # by which llama.cpp knows that special tokens swallow space
    stops, specials = loaded.renderer.stop_ids, loaded.tokenizer.specials
    # Without these llama.cpp takes 11, or 1 and 2. It finds the other stop tokens by their names.
    writer.add_bos_token_id(specials.get("<s>", stops[-1]))
    writer.add_eos_token_id(stops[0])
    writer.add_pad_token_id(stops[-1])
    if "<unk>" in specials:
        writer.add_unk_token_id(specials["<unk>"])
    writer.add_add_bos_token(False)
    if loaded.renderer.template:
        writer.add_chat_template(loaded.renderer.template)
