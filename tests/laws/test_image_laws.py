"""An image is the same alone and in a batch; padding shows nothing; tokens are counted exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from phikit.chat.image import ImageCrops, choose_grid, fit, load_image
from phikit.nn import vision
from phikit.nn.vision import ImageEmbedder, VisionConfig, position_ids

TINY = VisionConfig(
    d_model=16,
    d_mlp=24,
    num_layers=2,
    num_heads=2,
    patch_size=7,
    crop_size=28,
    positions_per_side=4,
    feature_layer=1,
)
PATCHES = TINY.patches_per_side
SIDES = st.integers(10, 300)


@pytest.fixture(scope="module")
def embedder() -> ImageEmbedder:
    embedder = ImageEmbedder(TINY, 12)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in embedder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return embedder.requires_grad_(False)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def tiny_crops(width: int, height: int, max_crops: int = 36) -> ImageCrops:
    return load_image(
        picture(width, height), max_crops=max_crops, crop_size=28, patch_size=TINY.patch_size
    )


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (1344, 896, 48 * 32 + 32 + 1 + 272),  # 1841, the example of vLLM's port
        (896, 1344, 32 * 48 + 48 + 1 + 272),
        (448, 448, 16 * 16 + 16 + 1 + 272),
        (448, 225, 9 * 16 + 9 + 1 + 272),  # 225 pixels: 17 rows of patches, pooled to 9
        (1, 1, 16 * 16 + 16 + 1 + 272),  # a dot fills a crop
    ],
)
def test_token_counts_at_full_size(width: int, height: int, tokens: int):
    assert load_image(Image.new("RGB", (width, height))).num_tokens == tokens


@given(SIDES, SIDES, st.integers(1, 12))
@example(28, 28, 1)
@example(28, 56, 2)
@settings(max_examples=60)
def test_tokens_are_counted_exactly(width: int, height: int, max_crops: int):
    grid = choose_grid(width, height, max_crops=max_crops, crop_size=28)
    size = fit(width, height, grid=grid, crop_size=28)
    if min(size) < 10:
        return
    crops = tiny_crops(width, height, max_crops)
    visible = [
        full - (full * 7 - pixels) // 7
        for full, pixels in zip((grid.columns * PATCHES, grid.rows * PATCHES), size, strict=True)
    ]
    columns, rows = (-(-patches // 2) for patches in visible)
    side = PATCHES // 2
    assert crops.num_tokens == (rows * columns + rows) + 1 + (side * side + side)
    assert len(crops.pixels_MCHW) == len(crops.mask_MPP) == 1 + grid.columns * grid.rows
    assert grid.columns * grid.rows <= max_crops
    assert crops.mask_MPP.any((1, 2)).all()  # attention always has something to look at
    assert np.abs(crops.pixels_MCHW[1:]).max() <= 1


def test_the_embedder_gives_as_many_tokens_as_were_counted(embedder: ImageEmbedder):
    images = [tiny_crops(*size) for size in [(28, 28), (60, 100), (99, 11), (150, 30), (84, 83)]]
    for image, embedded in zip(images, embedder(images), strict=True):
        assert embedded.shape == (image.num_tokens, 12)


def test_an_image_is_the_same_in_a_batch_as_alone(
    embedder: ImageEmbedder, monkeypatch: pytest.MonkeyPatch
):
    """More crops than the tower takes at once, so that passes cut through an image too."""
    crops = 16
    monkeypatch.setattr(vision, "PATCHES_PER_PASS", crops * PATCHES**2)
    images = [tiny_crops(*size) for size in [(28, 28), (160, 120), (99, 11), (84, 83), (10, 140)]]
    assert sum(len(image.pixels_MCHW) for image in images) > 2 * crops
    for image, embedded in zip(images, embedder(images), strict=True):
        torch.testing.assert_close(embedded, embedder([image])[0], atol=1e-6, rtol=0)


def test_crops_that_pad_a_batch_are_never_looked_at(embedder: ImageEmbedder):
    image = tiny_crops(60, 100)
    nothing = np.full((3, 3, 28, 28), np.nan, np.float32)
    padded = replace(
        image,
        pixels_MCHW=np.concatenate([image.pixels_MCHW, nothing]),
        mask_MPP=np.concatenate([image.mask_MPP, np.ones((3, PATCHES, PATCHES), np.bool_)]),
    )
    [alone], [with_padding] = embedder([image]), embedder([padded])
    assert torch.equal(alone, with_padding)


def test_no_images_give_no_tokens(embedder: ImageEmbedder):
    assert embedder([]) == []


def test_hidden_patches_do_not_reach_visible_ones(embedder: ImageEmbedder):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    mask = torch.ones(2, PATCHES, PATCHES, dtype=torch.bool)
    mask[0, :, 3:] = False
    mask[1, 1:] = False
    hidden = ~mask.repeat_interleave(7, 1).repeat_interleave(7, 2)
    changed = pixels.masked_fill(hidden[:, None], 100.0)
    visible = mask.flatten(1)
    before, after = (embedder.img_processor(p, mask)[visible] for p in (pixels, changed))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_every_patch_sees_every_other(embedder: ImageEmbedder):
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, PATCHES, PATCHES, dtype=torch.bool)
    for patch in range(PATCHES**2):
        row, column = divmod(patch, PATCHES)
        changed = pixels.clone()
        changed[..., row * 7 : row * 7 + 7, column * 7 : column * 7 + 7] += 1
        change = embedder.img_processor(changed, mask) - embedder.img_processor(pixels, mask)
        assert (change.abs().amax(-1) > 1e-6).all()


def test_positions_are_those_of_the_published_buckets():
    """floor(32 i / n) in integers is the reference's search among multiples of 1/32 in floats."""
    side = 32
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    for rows in range(1, side + 1):
        columns = side + 1 - rows
        mask = torch.zeros(1, side, side, dtype=torch.bool)
        mask[:, :rows, :columns] = True
        row, column = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), boundaries, right=True)
            for n in (rows, columns)
        )
        expected = torch.zeros(side, side, dtype=torch.long)
        expected[:rows, :columns] = row[:, None] * side + column
        assert torch.equal(position_ids(mask, side=side)[0].view(side, side), expected)
    full = torch.ones(1, side, side, dtype=torch.bool)
    assert torch.equal(position_ids(full, side=side)[0], torch.arange(side * side))
