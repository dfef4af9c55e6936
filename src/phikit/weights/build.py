"""A model built around tensors that lie in a file.

The model is made without memory (on the meta device), all names, shapes and dtypes in the file are
compared with what it needs, and then one parameter after another is allocated and filled, block by
block. So the peak is one copy of the model plus a few megabytes, and nothing stays mapped: a
checkpoint may be overwritten while the model it gave lives on.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from phikit.base.errors import WeightsError
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.registry import build, checkpoint_parts
from phikit.nn.quantised import QuantConfig
from phikit.weights.quantised import is_packed, put_empty

BYTES = "U8"
"""What files call the dtype of packed weights."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class TensorSource(Protocol):
    """Named tensors in a file or a folder, under the names of a Hugging Face checkpoint."""

    where: str
    """The file or folder, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Tensors whose numbers cannot be read as floating point, and the name of what they are."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The numbers of one tensor in row-major order, block by block, each flat.

        A block may take the memory of the one before.
        """
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, of a floating-point dtype."""
        ...

    def stored_dtype(self) -> torch.dtype:
        """The dtype to keep when none is asked for."""
        ...


def build_model(
    config: DecoderConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype | None,
    quantisation: QuantConfig | None = None,
) -> Decoder:
    """The model with the weights of `source`, on the CPU; `dtype` None keeps the stored one.

    With a `quantisation` the source holds packed weights, which are read as they are.

    Raises:
        WeightsError: lists every missing, unexpected, misshapen or unreadable tensor.
    """
    model = _empty_model(config, source)
    if quantisation is not None:
        put_empty(model, quantisation)
    is_head_spare = _check(model, source)
    if dtype is None:
        dtype = source.stored_dtype()
    for key, tensor in list(named_tensors(model)):
        filled = torch.empty(tensor.shape, dtype=tensor.dtype if is_packed(key) else dtype)
        first = 0
        for name, rows in stored_parts(config, key):
            if rows is None:
                fill(filled, source.blocks(name))
            else:
                fill(as_rows(filled)[first : first + rows], source.blocks(name))
                first += rows
        module, _, leaf = key.rpartition(".")
        made = nn.Parameter(filled) if isinstance(tensor, nn.Parameter) else filled
        setattr(model.get_submodule(module), leaf, made)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if is_head_spare and not _equals(model.lm_head.weight, source.blocks(HEAD)):
        raise WeightsError(
            f"{source.where} says that the head is tied to the embeddings, but its {HEAD} differs",
            fix='set "tie_word_embeddings": false in its config.json',
        )
    return model


def named_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a model: its parameters, a tied head once, then its buffers.

    Modalities that were attached lie beside it (`weights.surgery`).
    """
    beside = ("modalities.", *(f".adapters.{name}." for name in model.modalities))
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(part in key for part in beside):
            yield key, tensor


def stored_parts(config: DecoderConfig, key: str) -> list[tuple[str, int | None]]:
    """The tensors in files that make up our parameter or buffer `key`; see `Family.parts`."""
    return [(key, None)] if is_packed(key) else checkpoint_parts(config, key)


def as_rows(parameter: Tensor) -> Tensor:
    """A parameter as what checkpoint tensors are stacked in: stacks of matrices become one."""
    return parameter.flatten(0, -2) if parameter.ndim == 3 else parameter


def fill(target: Tensor, blocks: Iterable[Tensor]) -> None:
    """Copy the numbers of a tensor into a contiguous one of the same size."""
    flat, start = target.view(-1), 0
    for block in blocks:
        flat[start : start + len(block)] = block
        start += len(block)


def _equals(tensor: Tensor, blocks: Iterable[Tensor]) -> bool:
    """Whether `blocks`, cast to the dtype of `tensor`, hold the same numbers."""
    flat, start = tensor.detach().view(-1), 0
    for block in blocks:
        if not torch.equal(flat[start : start + len(block)], block.to(tensor.dtype)):
            return False
        start += len(block)
    return True


def _empty_model(config: DecoderConfig, source: TensorSource) -> Decoder:
    """The model without memory; refuses a damaged config before it can cost time."""
    if config.num_layers > len(source.shapes):
        raise WeightsError(
            f"{source.where} holds {len(source.shapes)} tensors, and its config describes "
            f"{config.num_layers} layers",
            fix="check that config.json and the weights belong together",
        )
    try:
        with torch.device("meta"):
            return build(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes below 0 or beyond 64 bits
        raise WeightsError(f"{source.where}: no model has this config: {error}") from error


def _check(model: Decoder, source: TensorSource) -> bool:
    """Compare names, shapes and dtypes; returns whether a tied head is stored all the same."""
    wanted: dict[str, tuple[int, ...]] = {}
    for key, tensor in named_tensors(model):
        for name, rows in stored_parts(model.config, key):
            shape = tuple(tensor.shape)
            wanted[name] = shape if rows is None else (rows, *as_rows(tensor).shape[1:])
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    found = {n: s for n, s in source.shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    is_head_spare = model.config.tie_embeddings and HEAD in found and EMBEDDING in wanted
    if is_head_spare:
        wanted[HEAD] = wanted[EMBEDDING]

    packed = {name for name in wanted if name.endswith(".packed")}
    unreadable = {n: kind for n, kind in source.unreadable.items() if n not in packed}
    faults = mismatches(found, wanted, unreadable=unreadable)
    faults += [
        f"{name} is kept as {source.unreadable.get(name, 'floating point')}, expected {BYTES}"
        for name in packed & found.keys()
        if source.unreadable.get(name) != BYTES
    ]
    if faults:
        raise WeightsError(
            f"{source.where} does not fit the model its config describes:"
            + "".join(f"\n  {fault}" for fault in faults),
            fix="check that config.json and the weights belong together",
        )
    return is_head_spare


def mismatches(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    unreadable: Mapping[str, str],
) -> list[str]:
    """One line for every tensor missing, unexpected, misshapen or unreadable, layers together.

    Args:
        found: name to shape, in the file.
        wanted: name to shape, in the model.
        unreadable: those in the file that hold no floating-point numbers, and what they hold.
    """
    missing = _by_layer(name for name in wanted if name not in found)
    unexpected = _by_layer(name for name in found if name not in wanted)
    faults = []
    for pattern, name in missing.items():
        near = difflib.get_close_matches(pattern, unexpected, n=1)
        faults.append(f"missing {name}" + (f"; nearest is {unexpected[near[0]]}" if near else ""))
    for pattern, name in unexpected.items():
        near = difflib.get_close_matches(pattern, missing, n=1)
        faults.append(f"unexpected {name}" + (f"; nearest is {missing[near[0]]}" if near else ""))
    shapes = defaultdict(list)
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            shapes[found[name], shape].append(name)
    for (is_shape, should), names in shapes.items():
        for name in _by_layer(names).values():
            faults.append(f"{name} has shape {list(is_shape)}, expected {list(should)}")
    kinds = defaultdict(list)
    for name, kind in unreadable.items():
        if name in found and name in wanted:
            kinds[kind].append(name)
    for kind, names in kinds.items():
        for name in _by_layer(names).values():
            faults.append(f"{name} is kept as {kind}, which cannot be read as floating point")
    return faults


def _by_layer(names: Iterable[str]) -> dict[str, str]:
    """Names that differ by a layer number alone, joined: `model.layers.{0,1,2}.mlp.up.weight`."""
    numbers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if found is None else f"{name[: found.start()]}*{name[found.end() :]}"
        numbers[pattern].append(found[0] if found else "")
    joined = {}
    for pattern, layers in numbers.items():
        span = layers[0] if len(layers) == 1 else "{" + ",".join(layers) + "}"
        joined[pattern] = pattern.replace("*", span, 1)
    return joined
