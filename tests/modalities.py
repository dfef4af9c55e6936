"""Small models that were taught to see, to hear and to feel, and batches that mix all of it."""

from typing import Any, NamedTuple

import numpy as np
import torch
from tests.sensor import SensorModality
from torch import Tensor

from phikit.base.media import Media, joined, of_items
from phikit.base.types import Example
from phikit.chat.audio import AudioClip
from phikit.chat.image import ImageCrops
from phikit.models.decoder import Decoder
from phikit.models.modality import AdapterConfig, ModalityConfig
from phikit.models.senses import SpeechModality, VisionModality
from phikit.nn.lora import adapter_parameters
from phikit.nn.speech import SpeechConfig
from phikit.nn.vision import VisionConfig
from phikit.weights.surgery import attach

SEES = VisionConfig(
    d_model=32,
    d_mlp=40,
    num_layers=2,
    num_heads=2,
    patch_size=7,
    crop_size=28,
    positions_per_side=4,
    feature_layer=2,
)
HEARS = SpeechConfig(d_model=32, num_layers=1, num_heads=4, d_mlp=24, subsampling_channels=8)
MODALITIES: tuple[ModalityConfig, ...] = (
    VisionModality(encoder=SEES, adapter=AdapterConfig(rank=4, alpha=8.0)),
    SpeechModality(encoder=HEARS, adapter=AdapterConfig(rank=6, alpha=12.0)),
    SensorModality(adapter=AdapterConfig(rank=2, alpha=4.0, targets=("o_proj",))),
)


def image(seed: int = 0) -> ImageCrops:
    """One crop of noise, which takes 13 tokens."""
    noise = np.random.default_rng(seed).standard_normal((2, 3, 28, 28)).astype(np.float32)
    return ImageCrops(noise, np.ones((2, 4, 4), np.bool_), 1, 1)


def clip(frames: int = 30, seed: int = 0) -> AudioClip:
    noise = np.random.default_rng(seed).standard_normal((frames, 80)).astype(np.float32)
    return AudioClip(noise, num_tokens=-(-frames // 8))


def series(seed: int = 0) -> Any:
    return SensorModality().prepare(np.random.default_rng(seed).standard_normal(20))


def taught(model: Decoder, *modalities: ModalityConfig, drawn: bool = True) -> Decoder:
    """The model with these modalities, by default all; adapters drawn, so that they matter."""
    for seed, modality in enumerate(modalities or MODALITIES):
        attach(model, modality, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(model, modality.name) if drawn else ():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * noise)
    return model


ROWS: dict[str, Media | None] = {
    "text": None,
    "speech": Media(clips=(clip(),)),
    "vision": Media(images=(image(),)),
    "both": Media((image(1),), (clip(44, 1), clip(17, 2))),
    "sensor": of_items({"sensor": (series(),)}),
    "text again": Media(),
}
"""A row of each kind."""


def example(model: Decoder, media: Media | None, *, length: int = 48, seed: int = 0) -> Example:
    """Random text with a run of placeholders for each item; the text's last third is learnt."""
    random = np.random.default_rng(seed)
    tokens = random.integers(10, 250, size=length)
    start = 2
    for name, items in (media.items if media else {}).items():
        for item in items:
            tokens[start : start + item.num_tokens] = model.senses[name].token
            start += item.num_tokens + 1
    assert start < 2 * length // 3
    return Example(tokens.astype(np.int32), np.arange(length) >= 2 * length // 3, media)


class Mixed(NamedTuple):
    """Rows of all kinds, all of one length."""

    tokens_BT: Tensor
    media: list[Media | None]
    text: list[int]
    """The rows of text."""


def mixed(model: Decoder) -> Mixed:
    rows = [example(model, media, seed=seed) for seed, media in enumerate(ROWS.values())]
    tokens_BT = torch.stack([torch.from_numpy(row.tokens).long() for row in rows])
    text = [i for i, media in enumerate(ROWS.values()) if joined([media]) is None]
    return Mixed(tokens_BT, list(ROWS.values()), text)
