"""Which parts of a model are quantised, and how its files say so.

Quantised are the matrices of the decoder's blocks (a mixture's experts too, its routers not), the
embeddings and the head. Norms, biases, routers, adapters and the encoders of images and sound stay
as they are, and so does a matrix whose rows are no multiple of the group. All of that follows from
the model's config and the `QuantConfig`, so a file is checked against it before a number is read.

A quantised matrix lies in the file as two tensors under phikit's own name of the parameter,
`NAME.packed` and `NAME.scales` (`nn.quantised` tells their layout); the others have their usual
names. `config.json` has a "quantization_config" whose "quant_method" is "phikit".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from phikit.base.errors import ConfigError, WeightsError
from phikit.models.decoder import Decoder
from phikit.nn.lora import BLOCKS, quantised
from phikit.nn.moe.experts import ExpertLinear
from phikit.nn.quantised import PackedWeight, QuantConfig, QuantEmbedding

KEY, METHOD = "quantization_config", "phikit"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Matrix(NamedTuple):
    """A weight that a quantisation means to pack."""

    path: str
    """Of its module in the model."""
    weight: nn.Parameter
    bits: int
    fits: bool
    """Whether its rows are whole groups; it is kept as it is otherwise."""


def matrices(model: Decoder, config: QuantConfig) -> list[Matrix]:
    """The weights to quantise of a model that is not quantised; tied ones once."""
    found = [
        (path, module.weight, config.bits)
        for path, module in model.named_modules()
        if path.startswith(f"{BLOCKS}.")
        and ".router." not in path
        and isinstance(module, nn.Linear | ExpertLinear)
    ]
    if config.embedding_bits != 16:
        found.append((EMBEDDING, model.model.embed_tokens.weight, config.embedding_bits))
        if not model.config.tie_embeddings:
            found.append((HEAD, model.lm_head.weight, config.embedding_bits))
    return [
        Matrix(path, weight, bits, fits=weight.shape[-1] % config.group == 0)
        for path, weight, bits in found
        if isinstance(weight, nn.Parameter)
    ]


def put(model: Decoder, path: str, weight: PackedWeight) -> None:
    """Give the module at `path` a quantised weight, and the head too if it is tied to it."""
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear | ExpertLinear):
        model.set_submodule(path, quantised(module, weight))
    else:
        model.set_submodule(path, QuantEmbedding(weight))
        if model.config.tie_embeddings:
            model.set_submodule(HEAD, quantised(model.lm_head, weight))


def put_empty(model: Decoder, config: QuantConfig) -> None:
    """Make a model on the meta device one whose weights are quantised."""
    with torch.device("meta"):
        for matrix in matrices(model, config):
            if matrix.fits:
                shape = matrix.weight.shape
                put(model, matrix.path, PackedWeight(shape, bits=matrix.bits, group=config.group))
    model.quantisation = config


def is_packed(name: str) -> bool:
    """Whether a parameter's or tensor's name is one of a quantised matrix."""
    return name.endswith((".weight.packed", ".weight.scales"))


def refuse_quantised(model: Decoder, purpose: str) -> None:
    """Raise WeightsError, for a `purpose` that needs the weights in floating point."""
    if model.quantisation is not None:
        raise WeightsError(
            f"the model is quantised to {model.quantisation.bits} bits, and {purpose} needs its "
            "weights in floating point",
            fix="take the model that it was quantised from; the result can be quantised again, "
            "with: phikit quantize IN OUT",
        )


def to_hf(config: QuantConfig) -> dict[str, Any]:
    """The "quantization_config" of `config.json`."""
    return {
        "quant_method": METHOD,
        "bits": config.bits,
        "group_size": config.group,
        "method": config.method,
        "embedding_bits": config.embedding_bits,
    }


def from_hf(values: Mapping[str, Any], *, where: object) -> QuantConfig | None:
    """How the model of a `config.json` is quantised; None if it is not.

    Raises:
        WeightsError: in another way than ours, or with settings that we do not know.
    """
    found = values.get(KEY)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise WeightsError(
            f"{where} is quantised by the method {method!r}; known is {METHOD!r}",
            fix="take the model's original weights, and quantise them with: phikit quantize IN OUT",
        )
    fields = {str(key): value for key, value in found.items() if key != "quant_method"}
    if "group_size" in fields:
        fields["group"] = fields.pop("group_size")
    try:
        return QuantConfig.resolve(fields)
    except ConfigError as error:
        raise WeightsError(
            f"{where} has a {KEY} that cannot be used: {error.what}",
            fix="quantise the original again, with: phikit quantize IN OUT",
        ) from error
