"""Sight and hearing: the two modalities of Phi-4-multimodal, for that model and for any other.

The encoders are `nn.vision` and `nn.speech`; here they become modalities. A model of one's own
takes them small: a crop of 28 pixels and two layers read a digit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phikit.base.errors import ChatError, MissingExtraError
from phikit.base.media import SPEECH, VISION
from phikit.chat.audio import MAX_SECONDS, NUM_MELS, AudioClip, load_audio
from phikit.chat.image import ImageCrops, load_image
from phikit.models.modality import Modality, ModalityConfig, register
from phikit.nn.speech import AudioEmbedder, MeanVarianceNorm, SpeechConfig
from phikit.nn.vision import ImageEmbedder, VisionConfig

TABLE_STD = 0.3
"""Of position tables, which the encoders leave at zero for a checkpoint to fill. About as large as
an embedded patch, so that a small tower sees from the start what is where."""
MIN_BAND_STD = 0.1
"""Of a mel band's logarithm; less is silence throughout, or a band beyond the sampling rate."""


@dataclass(frozen=True, slots=True, eq=False)
class SeenImage:
    """An image after the tower."""

    features_MQQD: NDArray[np.float32]
    mask_MPP: NDArray[np.bool_]
    height_crops: int
    width_crops: int
    overview: bool
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class HeardClip:
    """A clip after the encoder, one vector a token."""

    features_SD: NDArray[np.float32]

    @classmethod
    def of(cls, features_SD: Tensor) -> Self:
        return cls(features_SD.float().cpu().numpy())

    @property
    def num_tokens(self) -> int:
        return len(self.features_SD)


def heard(
    clips: Sequence[AudioClip | HeardClip],
    listen: Callable[[Sequence[AudioClip]], list[Tensor]],
    *,
    like: Tensor,
) -> list[Tensor]:
    """What an encoder makes of clips, one [tokens, D] each, with the device and the type of `like`.

    It listens to those alone that it has not heard before.
    """
    fresh = [clip for clip in clips if not isinstance(clip, HeardClip)]
    new = iter(listen(fresh) if fresh else ())
    return [
        torch.as_tensor(clip.features_SD).to(like.device, like.dtype)
        if isinstance(clip, HeardClip)
        else next(new)
        for clip in clips
    ]


class Sight(ImageEmbedder, Modality):
    """Images as crops; the learnt separators belong to the projector, as they end its sequences."""

    def forward(
        self, images: Sequence[ImageCrops | SeenImage], *, leader: str = VISION
    ) -> list[Tensor]:
        weight = self.img_projection_up.weight
        fresh = [image for image in images if not isinstance(image, SeenImage)]
        looked = iter(self.look(fresh) if fresh else ())
        return [
            self.tell(torch.as_tensor(image.features_MQQD).to(weight.device, weight.dtype), image)
            if isinstance(image, SeenImage)
            else self.tell(next(looked), image)
            for image in images
        ]

    @torch.no_grad()
    def encoded(self, items: Sequence[ImageCrops]) -> list[SeenImage]:
        return [
            SeenImage(
                features.float().cpu().numpy(),
                image.mask_MPP,
                image.height_crops,
                image.width_crops,
                image.overview,
                image.num_tokens,
            )
            for image, features in zip(items, self.look(items), strict=True)
        ]

    def projectors(self) -> dict[str, list[nn.Parameter]]:
        names = ("img_projection_up", "img_projection_down", "global_img", "sub_img")
        return {VISION: [p for name, p in self.named_parameters() if name.startswith(names)]}


class Hearing(AudioEmbedder, Modality):
    """Clips, with one projector for rows that show an image and one for those that do not."""

    def forward(
        self, clips: Sequence[AudioClip | HeardClip], *, leader: str = SPEECH
    ) -> list[Tensor]:
        features = heard(clips, self.listened, like=self.up_proj_for_speech.weight)
        return self.tell(features, mode=VISION if leader == VISION else SPEECH)

    @torch.no_grad()
    def encoded(self, items: Sequence[AudioClip]) -> list[HeardClip]:
        return [HeardClip.of(each) for each in self.listened(items)]

    def listened(self, clips: Sequence[AudioClip]) -> list[Tensor]:
        """The encoder's part: one [tokens, D] a clip, of the encoder's width."""
        device = self.up_proj_for_speech.weight.device
        features = [torch.as_tensor(clip.features_TF) for clip in clips]
        lengths_B = torch.tensor([len(each) for each in features], device=device)
        return self.listen(pad_sequence(features, batch_first=True).to(device), lengths_B)

    @property
    def bands(self) -> MeanVarianceNorm:
        """The statistics of the mel bands; zero mean and unit variance until they are measured."""
        return self.encoder.encoder_embedding

    def measure_bands(self, clips: Sequence[AudioClip]) -> None:
        """Take the mel bands' mean and variance from these clips; from none nothing."""
        if not clips:
            return
        frames_TF = torch.from_numpy(np.concatenate([clip.features_TF for clip in clips]))
        self.bands.global_mean.copy_(frames_TF.mean(0))
        self.bands.global_invstd.copy_(1 / frames_TF.std(0).clamp(min=MIN_BAND_STD))

    def projectors(self) -> dict[str, list[nn.Parameter]]:
        own = (self.up_proj_for_speech, self.down_proj_for_speech)
        beside = (self.up_proj_for_vision_speech, self.down_proj_for_vision_speech)
        return {
            leader: [parameter for linear in pair for parameter in linear.parameters()]
            for leader, pair in ((SPEECH, own), (VISION, beside))
        }


@register
class VisionModality(ModalityConfig):
    """Images, cut into crops and seen by a SigLIP tower."""

    kind: Literal["vision"] = "vision"
    name: str = VISION
    precedence: PositiveInt = 20
    encoder: VisionConfig = VisionConfig()
    max_crops: PositiveInt = 36
    """Most crops of one image; fewer cost fewer tokens."""
    overview_of_one: bool = True
    """Whether a picture of one crop is followed by itself as its overview, as in
    Phi-4-multimodal; InternVL 1.5 (arXiv 2404.16821) leaves that out."""

    def build(self, d_model: int) -> Sight:
        made = Sight(self.encoder, d_model)
        tower = made.img_processor
        del tower.head, tower.post_layernorm, tower.encoder.layers[self.encoder.feature_layer :]
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=TABLE_STD)
        if self.encoder.stem:
            _start_loud(tower.embeddings.patch_embedding)
        return made

    def prepare(self, source: Any) -> ImageCrops:
        """Of a path, the bytes of a file, or pixels [H, W, 3] as uint8."""
        encoder = self.encoder
        return load_image(
            _picture(source) if isinstance(source, np.ndarray) else source,
            max_crops=self.max_crops,
            crop_size=encoder.crop_size,
            patch_size=encoder.patch_size,
            overview_of_one=self.overview_of_one,
        )


@register
class SpeechModality(ModalityConfig):
    """Sound as log-mel frames, heard by a Conformer."""

    kind: Literal["speech"] = "speech"
    name: str = SPEECH
    precedence: PositiveInt = 10
    encoder: SpeechConfig = SpeechConfig()
    max_seconds: PositiveFloat = MAX_SECONDS
    """Longer clips are refused."""

    @field_validator("encoder")
    @classmethod
    def _hears_these_bands(cls, encoder: SpeechConfig) -> SpeechConfig:
        if encoder.num_mels != NUM_MELS:
            raise ValueError(f"num_mels: clips have {NUM_MELS} bands, not {encoder.num_mels}")
        return encoder

    def build(self, d_model: int) -> Hearing:
        made = Hearing(self.encoder, d_model)
        _start_loud(made.encoder.embed)
        return made

    def prepare(self, source: Any) -> AudioClip:
        """Of a path, the bytes of a file, or mono samples at 16 kHz as float32."""
        return load_audio(source, max_seconds=self.max_seconds)


def _start_loud(convolutions: nn.Module) -> None:
    """He et al.'s initialisation (2015, arXiv 1502.01852), which keeps the variance of a signal.

    Under torch's own, what differs between moments falls to a hundredth on its way through three
    convolutions, a seventh of what the biases add to every moment alike.
    """
    for module in convolutions.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]


def _picture(pixels_HWC: np.ndarray) -> Any:
    """Pixels as Pillow's image."""
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or pixels_HWC.dtype != np.uint8:
        raise ChatError(
            f"pixels are {pixels_HWC.dtype} of shape {pixels_HWC.shape}",
            fix="give them as uint8 [height, width, 3]",
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "media") from error
    return Image.fromarray(pixels_HWC)
