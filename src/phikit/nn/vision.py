"""The image side of Phi-4-multimodal: a SigLIP tower over crops, and the way into the decoder.

What is unusual in it:

- The feature of a patch is the output of layer 26 of 27. The last layer, `post_layernorm` and the
  pooling `head` are in every checkpoint and never run; they are modules here so that checkpoints
  load and save whole.
- Positions follow NaViT: however many rows and columns of a crop show the picture, they are spread
  over the whole position table.
- Attention is bidirectional. Patches that show only padding are hidden as keys and still get
  features, because average pooling may join such a patch with a visible one.
- An image is a sequence in the order the checkpoint calls `sub_glb`: its crops stitched into one
  map, a separator, then the whole picture seen as one crop; a learnt vector ends every row.

Shape suffixes beside the common ones: M crops, C channels, H and W pixels, P patches along one side
of a crop, Q the same after pooling (P / 2); T is the P x P patches of a crop, row by row.

Parameter names are those of `Phi4MultimodalImageEmbedding` in transformers. Sources: SigLIP
(arXiv 2303.15343), NaViT (2307.06304), dynamic HD in InternLM-XComposer2-4KHD (2404.06512),
Phi-4-Mini technical report (2503.01743) section 2.2.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.attention import whole_attention

PATCHES_PER_PASS = 16_384
"""Patches the tower takes at once, 16 crops of Phi-4-multimodal's: enough for a GPU, and it bounds
the memory."""


class VisionConfig(Config):
    """Architecture of the tower; the defaults are Phi-4-multimodal's."""

    d_model: PositiveInt = 1152
    d_mlp: PositiveInt = 4304
    num_layers: PositiveInt = 27
    num_heads: PositiveInt = 16
    patch_size: PositiveInt = 14
    """Side of a patch in pixels."""
    crop_size: PositiveInt = 448
    """Side of a crop in pixels."""
    positions_per_side: PositiveInt = 32
    """Rows, and columns, of the position table."""
    norm_eps: PositiveFloat = 1e-6
    feature_layer: PositiveInt = 26
    """The layer, counted from 1, whose output is used; transformers writes 26 of 27 as -2."""
    stem: tuple[PositiveInt, ...] = ()
    """Channels of 3 x 3 convolutions of stride 2 that take the place of SigLIP's one patch
    embedding. A tower that starts from nothing learns much faster with them (Xiao et al., 2021,
    arXiv 2106.14881), as a glyph then looks the same wherever it lies in its patch."""
    stem_blocks: NonNegativeInt = 0
    """Residual 3 x 3 convolutions behind each of those, at its size."""

    @property
    def patches_per_side(self) -> int:
        return self.crop_size // self.patch_size

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.crop_size % (2 * self.patch_size):
            raise ValueError(
                f"crop_size {self.crop_size} is no even number of patches of {self.patch_size}"
            )
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if self.stem and 2 ** len(self.stem) != self.patch_size:
            raise ValueError(
                f"{len(self.stem)} convolutions of stride 2 make patches of {2 ** len(self.stem)} "
                f"pixels, and patch_size is {self.patch_size}"
            )
        if self.feature_layer > self.num_layers:
            raise ValueError(
                f"feature_layer {self.feature_layer} is beyond num_layers {self.num_layers}"
            )
        return self


class VisionEmbeddings(nn.Module):
    """Patches as vectors, plus where in the picture they are."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.positions_per_side = config.positions_per_side
        patch = config.patch_size
        self.patch_embedding = (
            convolutional_stem(config)
            if config.stem
            else nn.Conv2d(3, config.d_model, kernel_size=patch, stride=patch)
        )
        # Zeros until a checkpoint or a draw fills them, as in `phikit.models.decoder.Trunk`.
        table = torch.zeros(config.positions_per_side**2, config.d_model)
        self.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, pixels_MCHW: Tensor, mask_MPP: Tensor) -> Tensor:
        patches_MTD = self.patch_embedding(pixels_MCHW).flatten(2).transpose(1, 2)
        positions_MT = position_ids(mask_MPP, side=self.positions_per_side)
        return patches_MTD + self.position_embedding(positions_MT)


class ResidualConvolution(nn.Module):
    """A 3 x 3 convolution whose result is added to what goes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_MCHW: Tensor) -> Tensor:
        return x_MCHW + F.gelu(self.conv(x_MCHW))


def convolutional_stem(config: VisionConfig) -> nn.Sequential:
    """Pixels to patches of `d_model`, by steps of half the size."""
    layers: list[nn.Module] = []
    for before, channels in pairwise((3, *config.stem)):
        layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.GELU()]
        layers += [ResidualConvolution(channels) for _ in range(config.stem_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(config.stem[-1], config.d_model, 1))


def position_ids(mask_MPP: Tensor, *, side: int) -> Tensor:
    """Each patch's entry in a position table of `side` rows and columns, [M, P * P].

    Row i of n visible ones takes table row floor(side * i / n), which is what the reference finds
    by sorting i / n into buckets of width 1 / side; columns likewise. The visible patches form a
    rectangle at the top left; the others take entry 0.
    """
    index_P = torch.arange(mask_MPP.shape[1], device=mask_MPP.device)
    rows_M = mask_MPP[:, :, 0].sum(1).clamp(min=1)
    columns_M = mask_MPP[:, 0, :].sum(1).clamp(min=1)
    row_MP = index_P * side // rows_M[:, None]
    column_MP = index_P * side // columns_M[:, None]
    ids_MPP = row_MP[:, :, None] * side + column_MP[:, None, :]
    return ids_MPP.where(mask_MPP, 0).flatten(1)


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention with biases and without rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_MTD: Tensor, visible_MT: Tensor | None) -> Tensor:
        q, k, v = (
            project(x_MTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = None if visible_MT is None else visible_MT[:, None, None]
        mixed = whole_attention(q, k, v, keys)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_mlp)
        self.fc2 = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x_MTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_MTD), approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_MTD: Tensor, visible_MT: Tensor | None) -> Tensor:
        x_MTD = x_MTD + self.self_attn(self.layer_norm1(x_MTD), visible_MT)
        return x_MTD + self.mlp(self.layer_norm2(x_MTD))


class VisionEncoder(nn.Module):
    """All layers of the checkpoint, run up to the one whose output is the feature."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.feature_layer = config.feature_layer
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x_MTD: Tensor, visible_MT: Tensor | None) -> Tensor:
        for layer in self.layers[: self.feature_layer]:
            x_MTD = layer(x_MTD, visible_MT)
        return x_MTD


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: parameters of the checkpoint that Phi-4-multimodal never runs."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.attention = nn.MultiheadAttention(config.d_model, config.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = VisionMLP(config)


class VisionTower(nn.Module):
    """SigLIP-so400m/14: crops of pixels in, one feature a patch out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)  # never run
        self.head = PoolingHead(config)  # never run

    def forward(self, pixels_MCHW: Tensor, mask_MPP: Tensor) -> Tensor:
        """Features of all patches, [M, P * P, D], hidden patches included.

        Args:
            pixels_MCHW: normalised to -1..1, `crop_size` pixels a side.
            mask_MPP: bool; True where a patch shows some of the picture. The True ones form a
                rectangle at the top left of each crop.
        """
        visible_MT = None if bool(mask_MPP.all()) else mask_MPP.flatten(1)
        return self.encoder(self.embeddings(pixels_MCHW, mask_MPP), visible_MT)


class Layout(Protocol):
    """How the crops of an image lie.

    Crop 0 is the whole picture; then come `height_crops` x `width_crops` crops, row by row. What
    follows them is padding of a batch and never looked at.
    """

    @property
    def mask_MPP(self) -> Any:
        """bool; True where a patch shows some of the picture."""
        ...

    @property
    def height_crops(self) -> int: ...

    @property
    def width_crops(self) -> int: ...

    @property
    def overview(self) -> bool:
        """Whether crop 0 has a place in the sequence."""
        ...


class Crops(Layout, Protocol):
    """One image cut into crops, as `phikit.chat.image.load_image` does; numpy or torch arrays."""

    @property
    def pixels_MCHW(self) -> Any:
        """float32, -1..1."""
        ...


def pool_patches(features_MTD: Tensor, *, side: int) -> Tensor:
    """The means of 2 x 2 patches, [M, Q, Q, D]; `side` is Q."""
    return features_MTD.unflatten(1, (side, 2, side, 2)).mean((2, 4))


def stitch(features_MQQD: Tensor, *, width_crops: int) -> Tensor:
    """Crops put together as they lie in the picture, [rows, columns, D]."""
    grid = features_MQQD.unflatten(0, (-1, width_crops))
    return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)


class ImageEmbedder(nn.Module):
    """Images as rows of decoder inputs.

    Args:
        config: the tower.
        d_model: width of the decoder.
    """

    def __init__(self, config: VisionConfig, d_model: int) -> None:
        super().__init__()
        self.img_processor = VisionTower(config)
        self.img_projection_up = nn.Linear(config.d_model, d_model)
        self.img_projection_down = nn.Linear(d_model, d_model)
        # The two learnt vectors that Microsoft's code calls glb_GN and sub_GN.
        self.global_img_feature_extensor = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.sub_img_feature_extensor = nn.Parameter(torch.zeros(1, 1, 1, config.d_model))

    def forward(self, images: Sequence[Crops]) -> list[Tensor]:
        """One [tokens, D] tensor an image.

        tokens = h * w + h + 1 + Q * Q + Q, where h x w is the pooled map of the crops without the
        rows and columns that show only padding; Q is 16 in Phi-4-multimodal.
        """
        if not images:
            return []
        features = self.look(images)
        return [self.tell(*each) for each in zip(features, images, strict=True)]

    def look(self, images: Sequence[Crops]) -> list[Tensor]:
        """The tower's part: one [crops, Q, Q, D] tensor an image."""
        weight = self.img_projection_up.weight
        counts = [1 + image.height_crops * image.width_crops for image in images]
        masks = [
            torch.as_tensor(image.mask_MPP)[:count]
            for image, count in zip(images, counts, strict=True)
        ]
        pixels = [
            torch.as_tensor(image.pixels_MCHW)[:count].to(weight.device, weight.dtype)
            for image, count in zip(images, counts, strict=True)
        ]
        features_MQQD = self.crop_features(torch.cat(pixels), torch.cat(masks).to(weight.device))
        return list(features_MQQD.split(counts))

    def tell(self, features_MQQD: Tensor, image: Layout) -> Tensor:
        """The projector's part: decoder inputs [tokens, D] from the features of one image."""
        return self.project(self.arrange(features_MQQD, image))

    def patch_features(self, pixels_MCHW: Tensor, mask_MPP: Tensor) -> Tensor:
        """The tower's features of all patches, row by row, [M, P * P, D]."""
        crops = max(1, PATCHES_PER_PASS // mask_MPP.shape[1] ** 2)
        passes = zip(pixels_MCHW.split(crops), mask_MPP.split(crops), strict=True)
        return torch.cat([self.img_processor(pixels, mask) for pixels, mask in passes])

    def crop_features(self, pixels_MCHW: Tensor, mask_MPP: Tensor) -> Tensor:
        """Features of the crops, averaged over 2 x 2 patches, [M, Q, Q, D]."""
        side = mask_MPP.shape[1] // 2
        features_MTD = self.patch_features(pixels_MCHW, mask_MPP)
        return pool_patches(features_MTD, side=side)

    def arrange(self, features_MQQD: Tensor, image: Layout) -> Tensor:
        """The features of one image as a sequence: crops, then separator and overview."""
        width_crops = image.width_crops
        mask_MPP = torch.as_tensor(image.mask_MPP)[: len(features_MQQD)]
        rows = int(mask_MPP[1::width_crops, ::2, 0].sum())
        columns = int(mask_MPP[1 : 1 + width_crops, 0, ::2].sum())
        stitched = stitch(features_MQQD[1:], width_crops=width_crops)
        parts = [self._with_row_ends(stitched[:rows, :columns])]
        if image.overview:
            separator = self.global_img_feature_extensor[0]
            parts += [separator, self._with_row_ends(features_MQQD[0])]
        return torch.cat(parts)

    @property
    def separators(self) -> tuple[Tensor, Tensor]:
        """The learnt vectors at the end of a row [1, 1, 1, D], and between the two views."""
        return self.sub_img_feature_extensor, self.global_img_feature_extensor

    def project(self, features_TD: Tensor) -> Tensor:
        """From the width of the tower to that of the decoder."""
        return self.img_projection_down(F.gelu(self.img_projection_up(features_TD)))

    def _with_row_ends(self, features: Tensor) -> Tensor:
        """[rows, columns, D] flattened, `sub_GN` after every row."""
        ends = self.sub_img_feature_extensor[0].expand(len(features), -1, -1)
        return torch.cat([features, ends], dim=1).flatten(0, 1)
