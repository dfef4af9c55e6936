"""What a sequence holds beside its text: images, clips, and whatever else a model was taught.

An item is what the preprocessing of its modality made: arrays, and how many placeholder tokens
stand for them. Which modalities there are is open, so items go by a modality's name; the two that
everybody has are fields of their own, and their placeholders read `<|image_1|>` and `<|audio_1|>`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

VISION: Final = "vision"
SPEECH: Final = "speech"
"""The modalities of images and of clips; their adapters bear the same names."""

_WORDS: Mapping[str, str] = MappingProxyType({VISION: "image", SPEECH: "audio"})


def word_of(modality: str) -> str:
    """What an item is called in placeholders: `<|image_1|>` for vision, else the own name."""
    return _WORDS.get(modality, modality)


class MediaItem(Protocol):
    """One item, ready for the encoder of its modality: a dataclass of arrays and numbers."""

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens that stand for it."""
        ...


class MediaTokens(NamedTuple):
    """How many tokens stand for each image and for each audio clip, the first one numbered 1."""

    images: Sequence[int] = ()
    audios: Sequence[int] = ()
    others: Mapping[str, Sequence[int]] = MappingProxyType({})
    """Those of further modalities, by the word in their placeholders."""
    ids: Mapping[str, int] | None = None
    """The placeholder token of each word; None takes the special tokens of the chat format."""

    @property
    def counts(self) -> dict[str, Sequence[int]]:
        """By the word in their placeholders."""
        return {word_of(VISION): self.images, word_of(SPEECH): self.audios, **self.others}


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """The images, the clips and the other items of one sequence, each in order of appearance."""

    images: tuple[Any, ...] = ()
    clips: tuple[Any, ...] = ()
    others: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Items of further modalities, by the modality's name."""

    @property
    def items(self) -> dict[str, tuple[Any, ...]]:
        """What there is, by modality; one without an item is absent."""
        every = {VISION: self.images, SPEECH: self.clips, **self.others}
        return {name: items for name, items in every.items() if items}

    @property
    def tokens(self) -> MediaTokens:
        """How many placeholders stand for each item."""
        counts = {
            name: [item.num_tokens for item in items]
            for name, items in {VISION: self.images, SPEECH: self.clips, **self.others}.items()
        }
        return MediaTokens(counts.pop(VISION), counts.pop(SPEECH), counts)

    def digest(self) -> bytes:
        """Equal for equal media alone."""
        digest = blake2b(digest_size=16)
        for name, items in self.items.items():
            digest.update(f"{name}{len(items)}".encode())
            for item in items:
                assert is_dataclass(item), type(item)
                for part in (getattr(item, entry.name) for entry in fields(item)):
                    if isinstance(part, np.ndarray):
                        digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
                    else:
                        assert isinstance(part, bool | int | float | str | None), type(part)
                        digest.update(repr(part).encode())
        return digest.digest()


def of_items(items: Mapping[str, tuple[Any, ...]]) -> Media:
    """The inverse of `Media.items`."""
    others = {name: of for name, of in items.items() if name not in _WORDS}
    return Media(items.get(VISION, ()), items.get(SPEECH, ()), others)


def joined(several: Iterable[Media | None]) -> Media | None:
    """The media of sequences that stand one after another in a row; None if there are none."""
    items: dict[str, tuple[Any, ...]] = {}
    for media in several:
        for name, of in (media.items if media else {}).items():
            items[name] = (*items.get(name, ()), *of)
    return of_items(items) if items else None
