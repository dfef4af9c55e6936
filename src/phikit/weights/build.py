"""A model built around tensors that lie in a file.

The model is made without memory (on the meta device), all names and shapes in the file are compared
with what it needs, and then one parameter after another is allocated and filled. So the peak is one
copy of the model plus one tensor, and nothing stays mapped: a checkpoint may be overwritten while
the model it gave lives on.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from phikit.base.errors import WeightsError
from phikit.models.dense import DenseConfig, DenseModel, checkpoint_parts

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class TensorSource(Protocol):
    """Named tensors in a file or a folder, under the names of a Hugging Face checkpoint."""

    where: str
    """The file or folder, for messages."""
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One tensor, of a floating-point dtype."""
        ...

    def stored_dtype(self) -> torch.dtype:
        """The dtype to keep when none is asked for."""
        ...


def build_model(
    config: DenseConfig, source: TensorSource, *, dtype: torch.dtype | None
) -> DenseModel:
    """The model with the weights of `source`, on the CPU; `dtype` None keeps the stored one.

    Raises:
        WeightsError: lists every missing, unexpected or misshapen tensor.
    """
    model = _empty_model(config, source)
    is_head_spare = _check(model, source)
    if dtype is None:
        dtype = source.stored_dtype()
    for key, parameter in list(model.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=dtype)
        first = 0
        for name, _ in checkpoint_parts(config, key):
            part = source.read(name)
            filled[first : first + len(part)] = part
            first += len(part)
        module, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(filled))
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if is_head_spare and not torch.equal(source.read(HEAD).to(dtype), model.lm_head.weight):
        raise WeightsError(
            f"{source.where} says that the head is tied to the embeddings, but its {HEAD} differs",
            fix='set "tie_word_embeddings": false in its config.json',
        )
    return model


def _empty_model(config: DenseConfig, source: TensorSource) -> DenseModel:
    """The model without memory; refuses a damaged config before it can cost time."""
    if config.num_layers > len(source.shapes):
        raise WeightsError(
            f"{source.where} holds {len(source.shapes)} tensors, and its config describes "
            f"{config.num_layers} layers",
            fix="check that config.json and the weights belong together",
        )
    try:
        with torch.device("meta"):
            return DenseModel(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes below 0 or beyond 64 bits
        raise WeightsError(f"{source.where}: no model has this config: {error}") from error


def _check(model: DenseModel, source: TensorSource) -> bool:
    """Compare names and shapes; returns whether a tied head is stored all the same."""
    wanted: dict[str, tuple[int, ...]] = {}
    for key, parameter in model.named_parameters():
        for name, rows in checkpoint_parts(model.config, key):
            wanted[name] = (rows or parameter.shape[0], *parameter.shape[1:])
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    found = {n: s for n, s in source.shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    is_head_spare = model.config.tie_embeddings and found.pop(HEAD, None) is not None

    faults = mismatches(found, wanted)
    if faults:
        raise WeightsError(
            f"{source.where} does not fit the model its config describes:"
            + "".join(f"\n  {fault}" for fault in faults),
            fix="check that config.json and the weights belong together",
        )
    return is_head_spare


def mismatches(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line for every missing, unexpected or misshapen tensor, layers taken together."""
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
