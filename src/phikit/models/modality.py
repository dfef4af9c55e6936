"""What a model perceives beside text: encoders, projectors, and which adapter a row runs on.

Any decoder of the library may have modalities (`weights.surgery.attach`). One is a module that
turns items into decoder inputs, and a token: the prompt holds a run of placeholders for each item,
whose embeddings are overwritten. A placeholder's id lies beyond the vocabulary. It is read and
never said, so embeddings and head stay those of the text model, bit for bit.

What a row contains decides how it runs. Of the modalities in it, the one of the highest precedence
leads: its adapter runs, and the other items may go through a projector of their own for its
company. Phi-4-multimodal is the case of two:

    row               adapter    projector of its clips
    text              none       -
    images            vision     -
    clips             speech     speech
    images and clips  vision     vision

Source: Phi-4-Mini technical report (arXiv 2503.01743), section 2.2.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.base.errors import ChatError, ConfigError
from phikit.base.media import Media, MediaItem, word_of
from phikit.nn.lora import route_of

NAME = re.compile(r"[a-z][a-z0-9]{0,31}")
"""Of a modality: it becomes part of placeholders, folders, and the names of files in shards."""


class LoraShape(Config):
    """Size of one adapter; its update is scaled by alpha / rank."""

    rank: PositiveInt
    alpha: PositiveFloat


class AdapterConfig(LoraShape):
    """The adapter that a modality brings."""

    targets: tuple[str, ...] | None = None
    """Linear layers of the blocks, by name; None takes those of attention and feed-forward."""


class Modality(nn.Module):
    """Items of one kind as rows of decoder inputs: an encoder, then a projector.

    Attributes:
        config: what it was built from.
        token: the id of its placeholders.
    """

    config: "ModalityConfig"
    token: int

    def known_by(self, config: "ModalityConfig", *, token: int) -> Self:
        """Set both attributes."""
        self.config, self.token = config, token
        return self

    def forward(self, items: Sequence[Any], *, leader: str) -> list[Tensor]:
        """One [tokens, D] tensor an item, tokens being the item's `num_tokens`.

        Args:
            items: all of rows that `leader` leads; at least one.
            leader: the modality whose adapter those rows run on; chooses among projectors.
        """
        raise NotImplementedError

    def encoded(self, items: Sequence[Any]) -> list[Any]:
        """The items with the encoder's work done, which `forward` takes as well.

        For stages that leave the encoder as it is. One that cannot returns what it was given.
        """
        return list(items)

    def projectors(self) -> dict[str, list[nn.Parameter]]:
        """The parameters between encoder and decoder; all others are the encoder's.

        By leader, its own first: that one serves all rows for which there is no other.
        """
        raise NotImplementedError


class Encoder(Protocol):
    """The part of a modality that `ProjectedModality` leaves to others; a module."""

    width: int
    """Of the vectors it gives."""

    def __call__(self, items: Sequence[Any]) -> list[Tensor]:
        """One [tokens, width] tensor an item."""
        ...


class ProjectedModality(Modality):
    """Any encoder, and two linear layers with a GELU between them for each leader.

    Args:
        encoder: an `Encoder` that is a module.
        d_model: width of the decoder.
        leaders: the modalities whose rows have a projector of their own; the first one's serves
            all others as well.
    """

    def __init__(self, encoder: Any, d_model: int, *, leaders: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.ModuleDict(
            {
                leader: nn.Sequential(
                    nn.Linear(encoder.width, d_model), nn.GELU(), nn.Linear(d_model, d_model)
                )
                for leader in leaders
            }
        )

    def forward(self, items: Sequence[Any], *, leader: str) -> list[Tensor]:
        first = next(iter(self.project))
        project = self.project[leader if leader in self.project else first]
        features = self.encoder(items)
        return list(project(torch.cat(features)).split([len(each) for each in features]))

    def projectors(self) -> dict[str, list[nn.Parameter]]:
        return {leader: [*module.parameters()] for leader, module in self.project.items()}


class ModalityConfig(Config):
    """One modality as plain data, which is saved beside the model; subclass it for one's own."""

    kind: str
    """Names the subclass; fixed in each of them by a Literal."""
    name: str
    """Of the modality, of its adapter, of its items in `Media` and of their placeholders: letters
    in lower case and digits."""
    precedence: NonNegativeInt = 0
    """In a row of several modalities the one of the highest precedence leads."""
    adapter: AdapterConfig | None = None
    """None leaves its rows to the bare base."""
    borrows: str | None = None
    """The modality whose adapter the rows run on that this one leads. So several can share one, and
    disturb each other."""

    @model_validator(mode="after")
    def _has_a_plain_name(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} is not lower case letters and digits")
        return self

    @model_validator(mode="after")
    def _has_one_adapter(self) -> Self:
        if self.adapter is not None and self.borrows is not None:
            raise ValueError("borrows: a modality with an adapter of its own borrows none")
        return self

    def without_adapter(self) -> Self:
        """The same with no adapter, of its own or borrowed."""
        return self.model_copy(update={"adapter": None, "borrows": None})

    def build(self, d_model: int) -> Modality:
        """The modality with fresh weights, for a decoder of this width."""
        raise NotImplementedError

    def prepare(self, source: Any) -> MediaItem:
        """An item from what people have: a path, bytes, an array.

        Raises ChatError, naming the source, for what cannot be read.
        """
        raise NotImplementedError


_KINDS: dict[str, type[ModalityConfig]] = {}
Kind = TypeVar("Kind", bound=ModalityConfig)


def register(config: type[Kind]) -> type[Kind]:
    """Make a kind of modality known, so that models that have it can be loaded; a decorator."""
    kind = config.model_fields["kind"].default
    assert isinstance(kind, str), f"{config.__name__}.kind needs a default"
    _KINDS[kind] = config
    return config


def modality_from(values: Mapping[str, Any]) -> ModalityConfig:
    """The config that was saved as `values`.

    Raises ConfigError for a kind that nobody has registered, and for settings it does not know.
    """
    kind = values.get("kind")
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        raise ConfigError(
            f"no modality of kind {kind!r} is known here",
            fix="import the module that registers it (models.modality.register)"
            + (f"; the nearest is {near[0]!r}" if near else ""),
        )
    return _KINDS[kind].resolve(values)


def by_precedence(senses: Mapping[str, Modality]) -> dict[str, Modality]:
    """The highest first; of equals the one that was attached first."""
    return dict(sorted(senses.items(), key=lambda entry: -entry[1].config.precedence))


def leader(senses: Mapping[str, Modality], media: Media | None) -> str | None:
    """The modality that leads a row, by what it contains; None for text."""
    items = media.items if media else {}
    return next((name for name in by_precedence(senses) if name in items), None)


def adapters_for(
    model: nn.Module, senses: Mapping[str, Modality], media: Sequence[Media | None]
) -> list[str | None]:
    """The adapter of each row; None where the model has none for what leads it, or nothing does."""
    attached = route_of(model).names
    leaders = [leader(senses, row) for row in media]
    wanted = [name and (senses[name].config.borrows or name) for name in leaders]
    return [name if name in attached else None for name in wanted]


def overwrite_media(
    x_BTD: Tensor,
    tokens_BT: Tensor,
    senses: Mapping[str, Modality],
    media: Sequence[Media | None],
) -> Tensor:
    """Embeddings with those of placeholders replaced by what the modalities make of the items.

    Items of one modality whose rows have one leader are encoded together.

    Raises:
        ChatError: a row's placeholders are more or fewer than its media take, or it holds items of
            a modality that the model has not.
    """
    assert len(media) == len(tokens_BT), (len(media), len(tokens_BT))
    if not senses:
        check_counts([], senses, next((row for row in media if row), None), where="the batch")
        return x_BTD
    is_item_MBT = torch.stack([tokens_BT == sense.token for sense in senses.values()])
    counts = is_item_MBT.sum(2).T.tolist()
    for row, (found, of_row) in enumerate(zip(counts, media, strict=True)):
        check_counts(found, senses, of_row, where=f"row {row}")
    leaders = [leader(senses, row) for row in media]
    for (name, sense), is_item_BT in zip(senses.items(), is_item_MBT, strict=True):
        for company in dict.fromkeys(led for led in leaders if led is not None):
            is_led = [led == company for led in leaders]
            rows = [row for row, here in zip(media, is_led, strict=True) if row and here]
            items = [item for row in rows for item in row.items.get(name, ())]
            if not items:
                continue
            is_led_B = torch.tensor(is_led, device=x_BTD.device)
            vectors = torch.cat(sense(items, leader=company)).to(x_BTD.dtype)
            where = (is_item_BT & is_led_B[:, None]).nonzero(as_tuple=True)
            x_BTD = x_BTD.index_put(where, vectors)
    return x_BTD


def check_counts(
    found: Sequence[int], senses: Mapping[str, Modality], media: Media | None, *, where: str
) -> None:
    """Raise ChatError unless the placeholders that were found, by modality, are what media take."""
    items = media.items if media else {}
    unknown = [name for name in items if name not in senses]
    if unknown:
        raise ChatError(
            f"{where} has media of the modality {unknown[0]!r}, which the model has not",
            fix=f"the model has {', '.join(senses)}"
            if senses
            else "load a multimodal model, or attach a modality (weights.surgery.attach)",
        )
    needed = [sum(item.num_tokens for item in items.get(name, ())) for name in senses]
    if list(found) != needed:
        words = " and ".join(f"{n} {word_of(s)}" for n, s in zip(found, senses, strict=True))
        raise ChatError(
            f"{where} has {words} placeholders; its media take {' and '.join(map(str, needed))}",
            fix="write each image and clip as num_tokens placeholders, where it appears",
        )
