"""Whisper's encoder as the ears of any decoder: a modality that starts from what others learnt.

Four vectors of 20 ms side by side make one token of 80 ms. Windows are as long as the config says:
Whisper was trained on 30 s, most of it silence for most clips, and a shorter one costs less.
Source: Radford et al., 2022 (arXiv 2212.04356); stacked vectors in front of a small projector as in
SLAM-ASR (Ma et al., 2024, arXiv 2402.08846).
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from phikit.base.media import SPEECH, VISION
from phikit.chat.audio import RATE_HZ, AudioClip, check_samples, samples_of
from phikit.chat.whisper_audio import HOP_SAMPLES, whisper_mel
from phikit.models.modality import ModalityConfig, ProjectedModality, register
from phikit.models.senses import HeardClip, heard
from phikit.nn.whisper import WhisperConfig, WhisperEncoder

VECTORS_PER_TOKEN = 4
SAMPLES_PER_TOKEN = VECTORS_PER_TOKEN * 2 * HOP_SAMPLES


class StackedWhisper(WhisperEncoder):
    """Of every clip the vectors that it fills itself, four to a token."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.width = VECTORS_PER_TOKEN * config.d_model

    def forward(self, items: Sequence[AudioClip | HeardClip]) -> list[Tensor]:
        return heard(items, self.listened, like=self.conv1.weight)

    def listened(self, clips: Sequence[AudioClip]) -> list[Tensor]:
        """One [tokens, 4 D] a clip; clips are windows of one length."""
        windows = torch.from_numpy(np.stack([clip.features_TF for clip in clips]))
        x_BSD = super().forward(windows.to(self.conv1.weight.device))
        x_BSD = x_BSD.unflatten(1, (-1, VECTORS_PER_TOKEN)).flatten(2)
        return [x_SD[: clip.num_tokens] for x_SD, clip in zip(x_BSD, clips, strict=True)]


class WhisperHearing(ProjectedModality):
    """Clips, with one projector for rows that show an image and one for those that do not."""

    encoder: StackedWhisper

    @torch.no_grad()
    def encoded(self, items: Sequence[AudioClip]) -> list[HeardClip]:
        return [HeardClip.of(each) for each in self.encoder.listened(items)]


@register
class WhisperModality(ModalityConfig):
    """Sound as log-mel windows, heard by Whisper's encoder."""

    kind: Literal["whisper"] = "whisper"
    name: str = SPEECH
    precedence: PositiveInt = 10
    encoder: WhisperConfig = WhisperConfig()
    window_seconds: float = Field(default=30.0, gt=0, le=30)
    """Longer clips are refused; taken up to a whole token."""
    start: str | None = None
    """The checkpoint that the encoder's weights are taken from when the modality is attached, as in
    `weights.whisper.load_whisper`; None draws them."""

    @model_validator(mode="after")
    def _has_positions(self) -> Self:
        vectors = VECTORS_PER_TOKEN * self.window_samples // SAMPLES_PER_TOKEN
        if vectors > self.encoder.max_positions:
            raise ValueError(
                f"window_seconds: {self.window_seconds:g} s are {vectors} vectors, and the encoder "
                f"has {self.encoder.max_positions} positions"
            )
        return self

    @property
    def window_samples(self) -> int:
        return -(-round(self.window_seconds * RATE_HZ) // SAMPLES_PER_TOKEN) * SAMPLES_PER_TOKEN

    def build(self, d_model: int) -> WhisperHearing:
        leaders = (SPEECH, VISION)
        return WhisperHearing(StackedWhisper(self.encoder), d_model, leaders=leaders)

    def prepare(self, source: Any) -> AudioClip:
        """Of a path, the bytes of a file, or mono samples at 16 kHz as float32."""
        samples, where = samples_of(source, max_seconds=self.window_seconds)
        check_samples(samples, where=where)
        mels = whisper_mel(
            samples, window_samples=self.window_samples, num_mels=self.encoder.num_mels
        )
        return AudioClip(mels, num_tokens=-(-len(samples) // SAMPLES_PER_TOKEN))
