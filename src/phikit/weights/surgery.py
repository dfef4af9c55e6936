"""Teach a decoder a new modality, and take it away again, without a change to its text.

`attach` adds an encoder, a projector, a placeholder token and a named adapter to any model of the
library. Nothing of the text model is touched: adapters act on rows with media alone, and the
placeholder is an id beyond the vocabulary. `detach` gives the model back bit for bit.

A modality is saved beside the text model, which stays the checkpoint it was: `NAME-modality/` holds
its config and weights, `NAME-lora/` its adapter in PEFT's layout.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from phikit.base.errors import ConfigError, WeightsError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.media import word_of
from phikit.models.decoder import Decoder
from phikit.models.modality import NAME, Modality, ModalityConfig, modality_from
from phikit.models.multimodal import adapter_folder
from phikit.models.whisper import WhisperHearing, WhisperModality
from phikit.nn.lora import (
    BLOCKS,
    adapter_parameters,
    add_adapters,
    choose_adapter,
    lora_linears,
    merge_lora,
    route_of,
)
from phikit.nn.quantised import QuantLinear
from phikit.weights.adapter import load_adapter, save_adapter
from phikit.weights.build import mismatches
from phikit.weights.safetensors_files import open_file, write_tensors
from phikit.weights.whisper import load_whisper

Part = Literal["encoder", "projector", "beside", "adapter"]
"""What a stage may train of a modality."""
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "up_proj", "down_proj")
"""Linears of attention and feed-forward, as the families call them."""
CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_TOKEN = 1 << 31


class Parts(NamedTuple):
    """The parameters of a modality."""

    encoder: list[nn.Parameter]
    projector: list[nn.Parameter]
    beside: list[nn.Parameter]
    """Projectors for rows that another modality leads: of clips beside an image."""
    adapter: list[nn.Parameter]


def attach(model: Decoder, modality: ModalityConfig, *, seed: int = 0) -> Parts:
    """Give a model a modality with fresh weights; returns its parameters.

    The adapter starts as the identity. Nothing is frozen and nothing chosen: `train_only` says what
    learns, and the rows' contents say what runs.

    Raises:
        ConfigError: the model has a modality or an adapter of that name, or its items are called as
            those of another; its blocks lack a target of the adapter, or there is no adapter of the
            name that it borrows.
        WeightsError, MissingExtraError: the checkpoint that its encoder starts from is missing,
            damaged, or of another shape.
    """
    name = modality.name
    if name in model.senses or name in route_of(model).names:
        raise ConfigError(
            f"the model has {name!r} already",
            fix="detach that one first, or give this modality another name",
        )
    is_taken = word_of(name) in map(word_of, model.senses) or hasattr(nn.ModuleDict, name)
    if is_taken or not NAME.fullmatch(name):
        raise ConfigError(
            f"a modality cannot be called {name!r} here", fix="use other lower case letters"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = modality.build(model.config.d_model)
    is_empty = model.device.type == "meta"  # as in a dry run, which needs no checkpoint
    if isinstance(modality, WhisperModality) and modality.start is not None and not is_empty:
        assert isinstance(made, WhisperHearing)
        load_whisper(made.encoder, modality.start)
    _adapt(model, modality, seed)
    taken = [sense.token for sense in model.senses.values()]
    token = max([model.config.vocab_size - 1, *taken]) + 1
    _put(model, made.known_by(modality, token=token))
    return parts(model, name)


def adapt(model: Decoder, modality: ModalityConfig, *, seed: int = 0) -> Parts:
    """Give a modality that was attached without an adapter the one it is to have, or to borrow.

    The same as if it had been attached with it, at the same seed; returns its parameters. Raises
    ConfigError if none of that name was attached, or it has an adapter, or its config differs in
    more than that.
    """
    name = modality.name
    sense = _check(model, name)
    if sense.config != modality.without_adapter() or name in route_of(model).names:
        raise ConfigError(
            f"{name!r} was attached with an adapter, or as another modality",
            fix="detach it first",
        )
    _adapt(model, modality, seed)
    sense.config = modality
    return parts(model, name)


def _adapt(model: Decoder, modality: ModalityConfig, seed: int) -> None:
    adapter = modality.adapter
    if modality.borrows is not None and modality.borrows not in route_of(model).names:
        raise ConfigError(
            f"{modality.name!r} borrows the adapter of {modality.borrows!r}, which there is not",
            fix="attach that one first",
        )
    if adapter is not None:
        targets = adapter.targets or _targets(model)
        generator = torch.Generator().manual_seed(seed)
        shape = {"rank": adapter.rank, "alpha": adapter.alpha}
        add_adapters(model, name=modality.name, targets=targets, generator=generator, **shape)


def detach(model: Decoder, name: str) -> None:
    """Take a modality away, its adapter included; the weights of the rest stay what they are.

    Raises ConfigError if none of that name was attached, or another one borrows its adapter.
    """
    _check(model, name)
    _check_unborrowed(model, name)
    del model.modalities[name]
    route = route_of(model)
    if name in route.names:
        route.names.remove(name)
    if route.chosen == name:
        route.chosen = None
    for path, linear in list(lora_linears(model)):
        if name in linear.adapters:
            del linear.adapters[name]
        if not len(linear.adapters):
            model.set_submodule(path, linear.bare())


def merge(model: Decoder, name: str) -> None:
    """Add a modality's adapter into the base for good, which changes the text model.

    The modality stays, and its rows run on the merged base. Raises ConfigError if none of that name
    was attached, or it has no adapter, or the model has other adapters, which were trained on
    the base as it was, or another modality borrows this one.
    """
    sense = _check(model, name)
    _check_unborrowed(model, name)
    merge_lora(model, name)
    sense.config = sense.config.model_copy(update={"adapter": None})


def attached(model: Decoder) -> dict[str, ModalityConfig]:
    """The modalities that were attached, by name."""
    return {name: sense.config for name, sense in _attached(model).items()}


def parts(model: Decoder, name: str) -> Parts:
    """The parameters of a modality of the model, attached or born with it.

    Raises ConfigError if there is none of that name.
    """
    senses = model.senses
    if name not in senses:
        raise ConfigError(f"the model has no modality {name!r}", fix=f"it has {[*senses]}")
    own, *others = senses[name].projectors().values()
    beside = [parameter for projector in others for parameter in projector]
    known = {id(parameter) for parameter in (*own, *beside)}
    encoder = [p for p in senses[name].parameters() if id(p) not in known]
    return Parts(encoder, own, beside, adapter_parameters(model, name))


def train_only(model: Decoder, learning: Mapping[str, Sequence[Part]]) -> list[nn.Parameter]:
    """Freeze the model but for these parts of its modalities; returns what learns.

    `{"vision": ("projector",)}` is the first stage of Phi-4-multimodal. Raises ConfigError for a
    modality or a part that the model has not.
    """
    trainable: list[nn.Parameter] = []
    for name, chosen in learning.items():
        of = parts(model, name)._asdict()
        for part in chosen:
            if not of.get(part):
                raise ConfigError(f"{name!r} has no {part} to train", fix="attach it with one")
            trainable += of[part]
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def thaw_text(model: Decoder) -> list[nn.Parameter]:
    """Let the text model learn; returns its parameters, those of adapters left out."""
    adapters = {id(p) for name in model.senses for p in parts(model, name).adapter}
    own = [p for p in model.model.parameters() if id(p) not in adapters]
    own += [p for p in model.lm_head.parameters() if all(p is not other for other in own)]
    for parameter in own:
        parameter.requires_grad_(True)
    return own


def save_modalities(folder: Path, model: Decoder, *, dtype: torch.dtype | None = None) -> None:
    """Write what was attached beside the model, and remove what an older save has left there.

    Raises StorageError: the disk is full or the folder may not be written.
    """
    senses = _attached(model)
    with storage_errors(folder):
        for old in folder.glob("*-modality"):
            if old.name not in {_folder(name) for name in senses}:
                shutil.rmtree(old)
                renew_adapter(folder, model, name=old.name.removesuffix("-modality"), dtype=dtype)
        for name, sense in senses.items():
            own = folder / _folder(name)
            own.mkdir(parents=True, exist_ok=True)
            about = {"token": sense.token, "modality": sense.config.model_dump(mode="json")}
            write_atomic(own / CONFIG, json.dumps(about, indent=2) + "\n")
            write_tensors(own / TENSORS, sense.state_dict(), dtype=dtype)
            renew_adapter(folder, model, name=name, dtype=dtype)


def renew_adapter(
    folder: Path, model: Decoder, *, name: str, dtype: torch.dtype | None = None
) -> None:
    """Write an adapter beside its model, or remove what an older save has left there of one that
    the model has no more: it would be read again, and after a merge count twice."""
    own = folder / adapter_folder(name)
    if name in route_of(model).names:
        save_adapter(own, model, name=name, dtype=dtype)
    else:
        shutil.rmtree(own, ignore_errors=True)


def saved_modalities(folder: Path) -> list[tuple[int, ModalityConfig]]:
    """The placeholder token and the config of what `save_modalities` has written, by token.

    Errors are those of `load_modalities`.
    """
    saved: list[tuple[int, ModalityConfig]] = []
    for own in folder.glob("*-modality"):
        token, config = _read_about(own / CONFIG)
        if _folder(config.name) != own.name or token in (known for known, _ in saved):
            raise WeightsError(
                f"{own / CONFIG} describes {config.name!r} with the token {token}, "
                "which is another's name or token",
                fix="save the model again",
            )
        saved.append((token, config))
    return sorted(saved, key=lambda entry: entry[0])


def saved_parameters(folder: Path, name: str) -> int:
    """How many numbers a saved modality has, without its adapter."""
    with open_file(folder / _folder(name) / TENSORS) as source:
        return sum(map(math.prod, source.shapes.values()))


def load_modalities(folder: Path, model: Decoder) -> None:
    """Attach what `save_modalities` has written beside a model.

    Raises:
        WeightsError: a file is missing or damaged, or does not fit the model.
        ConfigError: a modality is of a kind that nobody has registered.
    """
    for token, config in saved_modalities(folder):
        own = folder / _folder(config.name)
        if token not in range(model.config.vocab_size, MAX_TOKEN):
            raise WeightsError(
                f"{own / CONFIG}: the token {token} is one of the text's, or none",
                fix="save the model again",
            )
        wanted = _shapes(config, model.config.d_model, own / CONFIG)
        with open_file(own / TENSORS) as source:
            faults = mismatches(source.shapes, wanted, unreadable=source.unreadable)
            if faults:
                raise WeightsError(
                    f"{own / TENSORS} does not fit its config:"
                    + "".join(f"\n  {fault}" for fault in faults)
                )
            made = config.build(model.config.d_model)
            made.load_state_dict({name: source.read(name) for name in wanted})
        _put(model, made.known_by(config, token=token))
        if config.adapter is not None:
            load_adapter(folder / adapter_folder(config.name), model, name=config.name)
            choose_adapter(model, None)
            model.requires_grad_(True)  # which `load_adapter` has taken from it


def _shapes(config: ModalityConfig, d_model: int, path: Path) -> dict[str, tuple[int, ...]]:
    """Of a modality's tensors; nothing is allocated, as the config may ask for any size."""
    try:
        with torch.device("meta"):
            state = config.build(d_model).state_dict()
    except (RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} describes no modality: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _put(model: Decoder, sense: Modality) -> None:
    model.modalities[sense.config.name] = sense.to(model.device, model.dtype)


def _attached(model: Decoder) -> dict[str, Modality]:
    return {name: model.senses[name] for name in model.modalities}


def _check(model: Decoder, name: str) -> Modality:
    if name not in model.modalities:
        names = ", ".join(model.modalities) or "none"
        raise ConfigError(f"no modality {name!r} is attached", fix=f"those attached: {names}")
    return model.senses[name]


def _check_unborrowed(model: Decoder, name: str) -> None:
    for borrower, config in attached(model).items():
        if config.borrows == name:
            raise ConfigError(
                f"{borrower!r} borrows the adapter of {name!r}", fix=f"detach {borrower!r} first"
            )


def _targets(model: Decoder) -> list[str]:
    """Those of `TARGETS` that the blocks have."""
    leaves = {
        path.rpartition(".")[2]
        for path, module in model.get_submodule(BLOCKS).named_modules()
        if isinstance(module, nn.Linear | QuantLinear)
    }
    return [name for name in TARGETS if name in leaves]


def _folder(name: str) -> str:
    return f"{name}-modality"


def _read_about(path: Path) -> tuple[int, ModalityConfig]:
    """The placeholder token and the config that were saved."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        token, modality = int(values["token"]), dict(values["modality"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise WeightsError(
            f"{path} does not describe a modality: {error!r}", fix="save the model again"
        ) from error
    return token, modality_from(modality)
