"""The image side of Phi-4-multimodal against transformers: names, features, gradients, crops."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from phikit.chat.image import MIN_SIDE, ImageCrops, choose_grid, fit, load_image
from phikit.nn.vision import ImageEmbedder, VisionConfig, VisionTower

transformers = pytest.importorskip("transformers", reason="the reference of these tests")
reference = pytest.importorskip("transformers.models.phi4_multimodal.modeling_phi4_multimodal")

TINY = VisionConfig(
    d_model=32,
    d_mlp=48,
    num_layers=4,
    num_heads=2,
    patch_size=7,
    crop_size=56,
    positions_per_side=8,
    feature_layer=3,
)
D_MODEL = 24
IMAGE_TOKEN = 7
SIZES = [(56, 56), (150, 80), (30, 111), (112, 168)]
"""Width and height. The second hides three rows of patches, the third three columns: odd, so
that pooling joins hidden patches with visible ones. The last fills six crops."""


class Pair(NamedTuple):
    ours: ImageEmbedder
    theirs: Any


def reference_embedding(attention: str) -> Any:
    """transformers' module for the tiny config; `attention` is "eager" or "sdpa"."""
    vision = {
        "hidden_size": TINY.d_model,
        "intermediate_size": TINY.d_mlp,
        "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads,
        "image_size": TINY.crop_size,
        "crop_size": TINY.crop_size,
        "patch_size": TINY.patch_size,
        "layer_norm_eps": TINY.norm_eps,
        "feature_layer": TINY.feature_layer - TINY.num_layers - 1,
        "image_token_id": IMAGE_TOKEN,
    }
    config = transformers.Phi4MultimodalConfig(
        vision_config=vision, hidden_size=D_MODEL, embd_pdrop=0.0
    )
    config.vision_config._attn_implementation = attention
    module = reference.Phi4MultimodalImageEmbedding(config)
    assert module.img_processor.config._attn_implementation == attention
    return module.eval()


@torch.no_grad()
def drawn(module: ImageEmbedder) -> ImageEmbedder:
    """Weights large enough for attention, positions and both separators to matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return module


@pytest.fixture(scope="module")
def ours() -> ImageEmbedder:
    return drawn(ImageEmbedder(TINY, D_MODEL))


@pytest.fixture(scope="module")
def pair(ours: ImageEmbedder) -> Pair:
    theirs = reference_embedding("eager")
    theirs.load_state_dict(ours.state_dict())  # strict: the names and shapes are the same
    return Pair(ours, theirs)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def tiny_crops(width: int, height: int) -> ImageCrops:
    return load_image(
        picture(width, height), max_crops=6, crop_size=TINY.crop_size, patch_size=TINY.patch_size
    )


def random_crops() -> tuple[Tensor, Tensor]:
    """Four crops: all visible, right padding, bottom padding, both."""
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 8, 8, dtype=torch.bool)
    mask[1, :, 5:] = False
    mask[2, 3:] = False
    mask[3, :, 1:] = False
    mask[3, 7:] = False
    return pixels, mask


def their_features(theirs: Any, pixels: Tensor, mask: Tensor) -> Tensor:
    output = theirs.img_processor(pixels, patch_attention_mask=mask, output_hidden_states=True)
    return output.hidden_states[theirs.layer_idx]


def their_embeddings(theirs: Any, images: list[ImageCrops]) -> list[Tensor]:
    """The images padded to one batch as transformers wants them, and the rows taken out again."""
    most = max(len(image.pixels_MCHW) for image in images)
    pixels = torch.zeros(len(images), most, 3, TINY.crop_size, TINY.crop_size)
    mask = torch.ones(len(images), most, TINY.patches_per_side, TINY.patches_per_side)
    for row, image in enumerate(images):
        pixels[row, : len(image.pixels_MCHW)] = torch.from_numpy(image.pixels_MCHW)
        mask[row, : len(image.mask_MPP)] = torch.from_numpy(image.mask_MPP)
    sizes = torch.tensor([(i.height_crops, i.width_crops) for i in images]) * TINY.crop_size
    counts = [image.num_tokens for image in images]
    embedded = theirs(
        input_ids=torch.full((1, sum(counts)), IMAGE_TOKEN),
        inputs_embeds=torch.zeros(1, sum(counts), D_MODEL),
        image_pixel_values=pixels,
        image_sizes=sizes,
        image_attention_mask=mask,
    )
    return list(embedded[0].split(counts))


@torch.no_grad()
def test_features_of_every_patch(pair: Pair):
    pixels, mask = random_crops()
    ours = pair.ours.img_processor(pixels, mask)
    torch.testing.assert_close(ours, their_features(pair.theirs, pixels, mask), atol=1e-5, rtol=0)


@torch.no_grad()
def test_embedded_images(pair: Pair):
    images = [tiny_crops(*size) for size in SIZES]
    expected = their_embeddings(pair.theirs, images)
    for ours, theirs in zip(pair.ours(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradients(pair: Pair):
    images = [tiny_crops(*size) for size in SIZES]
    for model, embedded in (
        (pair.ours, pair.ours(images)),
        (pair.theirs, their_embeddings(pair.theirs, images)),
    ):
        model.zero_grad()
        rows = torch.cat(list(embedded))
        weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(4))
        (rows * weights).sum().backward()
    theirs = dict(pair.theirs.named_parameters())
    without = set()
    for name, parameter in pair.ours.named_parameters():
        expected = theirs[name].grad
        if parameter.grad is None or expected is None:
            assert parameter.grad is expected, name
            without.add(name.split(".")[1] if "layers" not in name else "last layer")
        elif name.endswith("k_proj.bias"):  # moves all scores of a query alike: exactly zero
            assert float(parameter.grad.abs().max()) < 1e-4
        else:
            distance = (parameter.grad - expected).norm() / expected.norm()
            assert distance <= 1e-4, (name, float(distance))
    assert without == {"post_layernorm", "head", "last layer"}


@torch.no_grad()
def test_attention_is_bidirectional_but_not_in_transformers_with_sdpa(ours: ImageEmbedder):
    """Change the last patch of a crop without padding and look at the feature of the first.

    transformers 5.23 marks the module causal and drops a mask that hides nothing, so its default
    attention ("sdpa") runs causally: the first patch sees no other. With "eager" it is right.
    """
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    changed = pixels.clone()
    changed[..., -7:, -7:] += 1
    mask = torch.ones(1, 8, 8, dtype=torch.bool)

    def effect(features: Any) -> float:
        return float((features(changed) - features(pixels))[0, 0].abs().max())

    effects = {"ours": effect(lambda crop: ours.img_processor(crop, mask))}
    for attention in ("eager", "sdpa"):
        theirs = reference_embedding(attention)
        theirs.load_state_dict(ours.state_dict())
        effects[attention] = effect(lambda crop, theirs=theirs: their_features(theirs, crop, mask))
    assert effects["sdpa"] == 0.0
    assert effects["ours"] > 1e-3
    assert effects["ours"] == pytest.approx(effects["eager"], rel=1e-4)


def test_parameter_counts_are_the_published_ones():
    """Phi-4-multimodal: tower and pooling head 413.3 M + 15.2 M, with the projector 441.6 M."""
    with torch.device("meta"):
        embedder = ImageEmbedder(VisionConfig(), 3072)
    tower = embedder.img_processor
    assert isinstance(tower, VisionTower)
    total = sum(parameter.numel() for parameter in embedder.parameters())
    head = sum(parameter.numel() for parameter in tower.head.parameters())
    vision = sum(parameter.numel() for parameter in tower.parameters()) - head
    assert [round(n / 1e6, 1) for n in (vision, head, total)] == [413.3, 15.2, 441.6]


# --- Preprocessing --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_processor() -> Any:
    """transformers' image processor; the four torchvision calls it makes are given here.

    `resize` is Pillow's, as in the processor that Microsoft published: torchvision's resizes a
    Pillow image with Pillow.
    """

    scaled_to: list[list[int]] = []

    def resize(image: Tensor, size: list[int]) -> Tensor:
        scaled_to.append(size)
        if image.is_meta:
            return image.new_empty(3, *size)
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        scaled = pillow.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)

    def pad(image: Tensor, padding: list[int], fill: list[int]) -> Tensor:
        return F.pad(image, (padding[0], padding[2], padding[1], padding[3]), value=fill[0])

    importlib.import_module("transformers.image_processing_backends")
    functional = SimpleNamespace(resize=resize, pad=pad)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(sys.modules["torchvision.transforms.v2"], "functional", functional, False)
        module = importlib.import_module(
            "transformers.models.phi4_multimodal.image_processing_phi4_multimodal"
        )

    class Processor(module.Phi4MultimodalImageProcessor):
        def __init__(self) -> None:
            self.scaled_to = scaled_to

        def rescale_and_normalize(self, image, _, factor, __, mean, std) -> Tensor:
            return (image.float() * factor - mean[0]) / std[0]

        def resize(self, image, size, *, resample, antialias) -> Tensor:
            assert resample == Image.Resampling.BICUBIC and not antialias
            shape = (size.height, size.width)
            return F.interpolate(image[None], size=shape, mode="bicubic")[0]

    return Processor()


PHOTOS = [(448, 448), (1344, 896), (500, 300), (37, 61), (3000, 100), (2500, 3100), (449, 447)]


@pytest.mark.parametrize(("width", "height"), PHOTOS)
@pytest.mark.parametrize("max_crops", [4, 36])
def test_crops_are_those_of_the_reference(
    reference_processor: Any, width: int, height: int, max_crops: int
):
    image = picture(width, height)
    theirs = reference_processor._preprocess(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1)],
        do_resize=True,
        size=SimpleNamespace(height=448, width=448),
        resample=Image.Resampling.BICUBIC,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        patch_size=14,
        dynamic_hd=max_crops,
        return_tensors="pt",
    )
    ours = load_image(image, max_crops=max_crops)
    expected = theirs["image_pixel_values"][0].numpy()
    np.testing.assert_allclose(ours.pixels_MCHW, expected, atol=2e-6, rtol=0)
    assert np.array_equal(ours.mask_MPP, theirs["image_attention_mask"][0].numpy() == 1)
    assert [ours.height_crops * 448, ours.width_crops * 448] == theirs["image_sizes"][0].tolist()
    assert ours.num_tokens == int(theirs["num_img_tokens"][0])


def test_grids_are_those_of_the_reference(reference_processor: Any):
    """2,000 sizes from 3 to 8,000 pixels a side; few crops, so that grids are often as near."""
    random = np.random.default_rng(6)
    for width, height in np.exp(random.uniform(1.1, 9, (2000, 2))).astype(int).tolist():
        max_crops = int(random.choice([1, 2, 5, 12, 36]))
        grid = choose_grid(width, height, max_crops=max_crops)
        size = fit(width, height, grid=grid)
        without_pixels = torch.empty(3, height, width, device="meta")
        try:
            padded, _ = reference_processor.dynamic_preprocess(
                without_pixels, 448, 14, 32, max_num=max_crops
            )
        except ValueError:
            assert min(size) < MIN_SIDE
        else:
            assert padded.shape[1:] == (grid.rows * 448, grid.columns * 448)
            assert reference_processor.scaled_to[-1] == [size[1], size[0]]
