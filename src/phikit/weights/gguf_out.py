"""Write a dense model as one GGUF file that llama.cpp runs.

Norms and other vectors stay in float32, as llama.cpp wants. Under "q4_0" the embeddings and the
head are kept in Q8_0, since an error there reaches every token. A matrix whose rows are no multiple
of a quantisation's block of 32 becomes F16. Tensors are quantised and written one at a time.

A model that phikit has quantised keeps its integers and scales, since its groups are blocks or
whole numbers of blocks: nothing is rounded a second time, and what GPTQ has gained stays.

What the file says beside the weights follows llama.cpp's converter (`conversion/phi.py`, `llama.py`
and `base.py`), except that no token is put before a prompt: our renderers write whole prompts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.base.files import replacing
from phikit.models.dense import DenseConfig
from phikit.models.registry import checkpoint_parts
from phikit.nn.quantised import PackedWeight
from phikit.nn.rope import LongRope
from phikit.weights import gguf_blocks
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
from phikit.weights.quantised import is_packed
from phikit.weights.save import checkpoint_tensors, refuse_adapters

Quant = Literal["f16", "bf16", "q8_0", "q4_0"]
OnProgress = Callable[[int, int], None]
"""Called after each tensor with the number of weights written and of all."""
_BLOCK_NUMBERS = 1 << 20  # quantised at once
_GREATEST = {"F16": 65504, "Q8_0": 65504 * 127, "Q4_0": 65504 * 8}
"""The greatest magnitude a kind keeps; its scales are float16."""


class _Tensor(NamedTuple):
    """A tensor of the file."""

    source: Tensor | PackedWeight
    rows: slice
    """Of the source."""
    shape: tuple[int, ...]
    kind: Any
    """`gguf.GGMLQuantizationType`."""


def save_gguf(
    path: str | Path, loaded: Loaded, *, quant: Quant, on_progress: OnProgress | None = None
) -> None:
    """Write weights, tokenizer and chat template to `path`, under another name first.

    A quantised model is written as `quant` "q4_0" or "q8_0", whichever has its bits; as "f16" or
    "bf16" it is dequantised.

    Raises:
        WeightsError: the model is of another family, has adapters attached, holds numbers that the
            quantisation cannot keep, is quantised to other bits, or is one that llama.cpp would run
            otherwise.
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
    weights = {**_plain(gguf, loaded, quant), **_quantised(gguf, loaded, quant)}
    for name, tensor in weights.items():
        _check_range(name, tensor)

    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, config.layout)
        try:
            _write_about(writer, gguf, loaded, quant=quant)
            write_config(config, writer)
            _write_tokenizer(writer, tables, loaded)
            factors = {} if config.longrope is None else _factors(config.longrope)
            for name, values in factors.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for name, tensor in weights.items():
                writer.add_tensor_info(
                    gguf_name(name, config.layout),
                    tensor.shape,
                    np.dtype(np.float32),
                    int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))),
                    raw_dtype=tensor.kind,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in factors.values():
                writer.write_tensor_data(values)
            done, of = 0, sum(int(np.prod(tensor.shape)) for tensor in weights.values())
            for name, tensor in weights.items():
                is_permuted_here = is_permuted(name, config.layout)
                writer.write_tensor_data(_bytes(tensor, config.head_dim if is_permuted_here else 0))
                done += int(np.prod(tensor.shape))
                if on_progress is not None:
                    on_progress(done, of)
        finally:
            writer.close()


def _plain(gguf: Any, loaded: Loaded, quant: Quant) -> dict[str, _Tensor]:
    """The weights in floating point."""
    if loaded.model.quantisation is not None and quant in ("q8_0", "q4_0"):
        # What a quantised model has left in floating point stays there.
        quant = "bf16" if loaded.model.dtype == torch.bfloat16 else "f16"
    return {
        name: _Tensor(
            tensor,
            slice(None),
            tuple(tensor.shape),
            _kind(gguf, name, tuple(tensor.shape), quant),
        )
        for name, tensor in checkpoint_tensors(loaded.model).items()
        if not is_packed(name)
    }


def _quantised(gguf: Any, loaded: Loaded, quant: Quant) -> dict[str, _Tensor]:
    """The packed weights, under the names that their parts have in files."""
    found: dict[str, _Tensor] = {}
    seen: set[PackedWeight] = set()
    bits = loaded.model.quantisation and loaded.model.quantisation.bits
    if bits and quant in ("q8_0", "q4_0") and quant != gguf_blocks.KINDS[bits]:
        raise WeightsError(
            f"the model is quantised to {bits} bits, and {quant} would round it again",
            fix=f"write it as {gguf_blocks.KINDS[bits]}, which keeps its numbers, or as f16",
        )
    for path, weight in loaded.model.named_modules():
        if not isinstance(weight, PackedWeight) or weight in seen:  # tied embeddings and head
            continue
        seen.add(weight)
        kind = quant.upper() if quant in ("f16", "bf16") else gguf_blocks.KINDS[weight.bits].upper()
        first, (out_features, width) = 0, weight.shape
        for name, rows in checkpoint_parts(loaded.config, path):
            count = out_features if rows is None else rows
            part = slice(first, first + count)
            found[name] = _Tensor(weight, part, (count, width), gguf.GGMLQuantizationType[kind])
            first += count
    return found


def _kind(gguf: Any, name: str, shape: tuple[int, ...], quant: Quant) -> Any:
    """The quantisation of one tensor."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    kind = kinds[quant.upper()]
    if kind == kinds.Q4_0 and not name.startswith("model.layers."):
        kind = kinds.Q8_0
    block_numbers, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if shape[-1] % block_numbers else kind


def _check_range(name: str, tensor: _Tensor) -> None:
    greatest, source = _GREATEST.get(tensor.kind.name), tensor.source
    if greatest is None:
        return
    if isinstance(source, PackedWeight):  # the magnitude of its numbers is about that of this
        largest = source.scales.abs().amax().float() * 2 ** (source.bits - 1)
    else:
        largest = source.abs().amax()
    if not largest <= greatest:  # NaN is refused too
        raise WeightsError(
            f"{name} holds {largest:.3g}, beyond the {greatest:.3g} of {tensor.kind.name}",
            fix='write it with quant="bf16"',
        )


def _bytes(tensor: _Tensor, head_dim: int) -> np.ndarray:
    """What stands in the file; `head_dim` is 0 where the order of rows stays."""
    source, kind = tensor.source, tensor.kind.name.lower()
    is_block = kind in ("q8_0", "q4_0")
    if isinstance(source, PackedWeight):
        if is_block:
            q_OI, scales_OB = gguf_blocks.transferred(source, tensor.rows)
            if head_dim:
                q_OI, scales_OB = (halves_to_pairs(x, head_dim) for x in (q_OI, scales_OB))
            return gguf_blocks.blocks(q_OI, scales_OB, kind).numpy()
        source = source.dequantise(torch.float32)
    weight = source[tensor.rows].to("cpu")
    if head_dim:
        weight = halves_to_pairs(weight, head_dim)
    if is_block:
        step = max(1, _BLOCK_NUMBERS // weight.shape[-1])
        parts = [gguf_blocks.quantised(rows.float(), kind) for rows in weight.split(step)]
        return torch.cat(parts).numpy()
    match kind:
        case "f32":
            return weight.float().numpy()
        case "f16":
            return weight.half().numpy()
        case _:
            return weight.bfloat16().contiguous().view(torch.int16).numpy()


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
