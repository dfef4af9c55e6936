"""The table of model families: one line a family, read by everything that loads, saves or lists."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from phikit.base.errors import ConfigError
from phikit.models import dense, moe, multimodal, phi, phi3_small
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.hf import check_keys


class Family(NamedTuple):
    """How one family is built, and how its checkpoints are read and written."""

    config: type[DecoderConfig]
    build: Callable[[Any], Decoder]
    model_types: tuple[str, ...]
    """Values of `model_type` in `config.json` that are this family."""
    keys: frozenset[str]
    """Keys of `config.json` that `from_hf` obeys or that cannot change a number."""
    from_hf: Callable[[dict[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]
    parts: Callable[[Any, str], list[tuple[str, int | None]]]
    """The checkpoint tensors that make up one parameter, stacked in row order: (name, rows).

    A parameter of more than two dimensions is flattened to rows first; rows is None where one
    tensor is the whole parameter.
    """


FAMILIES: tuple[Family, ...] = (
    Family(
        config=dense.DenseConfig,
        build=dense.DenseModel,
        model_types=("phi3", "llama"),
        keys=dense.KEYS,
        from_hf=dense.from_hf_config,
        to_hf=dense.to_hf_config,
        parts=dense.checkpoint_parts,
    ),
    Family(
        config=moe.MoEConfig,
        build=moe.MoEModel,
        model_types=("phimoe", "grinmoe", moe.OWN_TYPE),
        keys=moe.KEYS,
        from_hf=moe.from_hf_config,
        to_hf=moe.to_hf_config,
        parts=moe.checkpoint_parts,
    ),
    Family(
        config=phi.PhiConfig,
        build=phi.PhiModel,
        model_types=("phi",),
        keys=phi.KEYS,
        from_hf=phi.from_hf_config,
        to_hf=phi.to_hf_config,
        parts=phi.checkpoint_parts,
    ),
    Family(
        config=phi3_small.Phi3SmallConfig,
        build=phi3_small.Phi3SmallModel,
        model_types=("phi3small",),
        keys=phi3_small.KEYS,
        from_hf=phi3_small.from_hf_config,
        to_hf=phi3_small.to_hf_config,
        parts=phi3_small.checkpoint_parts,
    ),
    Family(
        config=multimodal.MultimodalConfig,
        build=multimodal.MultimodalModel,
        model_types=("phi4_multimodal", "phi4mm"),
        keys=multimodal.KEYS,
        from_hf=multimodal.from_hf_config,
        to_hf=multimodal.to_hf_config,
        parts=multimodal.checkpoint_parts,
    ),
)


def family_of(config: DecoderConfig) -> Family:
    """The family a config belongs to."""
    return next(family for family in FAMILIES if type(config) is family.config)


def build(config: DecoderConfig) -> Decoder:
    """The model of a config, its weights zero or undefined."""
    return family_of(config).build(config)


def config_from_hf(values: dict[str, Any]) -> DecoderConfig:
    """Read the `config.json` of any family.

    Raises ConfigError for a family or a feature we do not run, and for keys we would not obey.
    """
    model_type = values.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            check_keys(values, family.keys)
            return family.from_hf(values)
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(
        f"model_type is {model_type!r}; known are {', '.join(known)}",
        fix="point at a checkpoint of one of these families",
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model."""
    return family_of(config).to_hf(config)


def checkpoint_parts(config: DecoderConfig, key: str) -> list[tuple[str, int | None]]:
    """`Family.parts` of the config's family."""
    return family_of(config).parts(config, key)


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters, counted on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def active_parameter_count(config: DecoderConfig) -> int:
    """Number of parameters that one token meets; fewer than all in a mixture of experts."""
    idle = config.idle_parameters if isinstance(config, moe.MoEConfig) else 0
    return parameter_count(config) - idle


def parameters_by_part(config: DecoderConfig) -> Mapping[str, int]:
    """Number of parameters of each part; a shared tensor counts once.

    A part of the decoder goes by its module's name, an adapter and an encoder by their own.
    """
    parts: dict[str, int] = {}
    with torch.device("meta"):
        for name, parameter in build(config).named_parameters():
            top, leaf = name.partition(".")[0], name.rsplit(".", 2)[-2]
            part = leaf if top in ("model", "lm_head") else top
            if ".adapters." in name:
                part = f"{leaf} adapter"
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
