"""Opening images: what is refused and how, and what the model is given."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phikit.base.errors import ChatError, MissingExtraError
from phikit.chat import image as chat_image
from phikit.chat.image import choose_grid, load_image, open_image


def picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of 57 bytes whose header claims any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_file(kind: str, share: float):
    data = encoded(picture(), kind)
    with pytest.raises(ChatError, match="the image (cannot be read|is no PNG)"):
        open_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\x00\x00\x00WEBP"])
def test_not_an_image(data: bytes):
    with pytest.raises(ChatError, match="no PNG, JPEG or WebP"):
        open_image(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_not_decoded(kind: str):
    with pytest.raises(ChatError, match="no PNG, JPEG or WebP"):
        open_image(encoded(picture(), kind))


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb(size: tuple[int, int]):
    with pytest.raises(ChatError, match="64,000,000"):
        open_image(png_claiming(*size))


def test_too_many_pixels_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_image, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(ChatError, match="40 x 30"):
        open_image(picture())


def test_a_file_of_too_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data = encoded(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(chat_image, "MAX_BYTES", len(data) - 1)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(ChatError, match=f"{len(data):,} bytes"):
            open_image(source)


def test_no_such_file(tmp_path: Path):
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), tmp_path):
        with pytest.raises(ChatError, match="there is no file"):
            open_image(source)


def test_a_path_that_cannot_be_one():
    with pytest.raises(ChatError, match="cannot be read|there is no file"):
        open_image("a\0.png")


def test_sixteen_bits_a_channel():
    deep = Image.fromarray(np.full((20, 20), 40_000, np.uint16))
    for source in (deep, encoded(deep, "PNG")):
        with pytest.raises(ChatError, match="8 bits"):
            open_image(source)


def test_an_image_without_pixels():
    with pytest.raises(ChatError, match="0 x 5"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("size", [(20_000, 5), (5, 20_000)])
def test_too_long_and_thin(size: tuple[int, int]):
    with pytest.raises(ChatError, match="thinner than 10"):
        load_image(Image.new("RGB", size))


def test_no_crops_allowed():
    with pytest.raises(ChatError, match="max_crops is 0"):
        load_image(picture(), max_crops=0)


def test_pillow_is_an_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pillow.*\n.*phikit\[media\]"):
        open_image(b"")


@given(st.data())
@settings(max_examples=300)
def test_damaged_data_gives_an_image_or_a_typed_error(data: st.DataObject):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(content))
    except ChatError:
        return
    assert image.mode == "RGB"


# --- What the model is given ------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same(tmp_path: Path):
    data = encoded(picture(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.asarray(picture())
    for source in (data, path, str(path), picture()):
        assert np.array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str):
    assert open_image(picture().convert(mode)).mode == "RGB"


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    opened = open_image(encoded(turned, "PNG", exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(picture()))


def test_black_is_minus_one_and_padding_is_white():
    crops = load_image(Image.new("RGB", (448, 200)))
    assert crops.pixels_MCHW.dtype == np.float32 and crops.mask_MPP.dtype == np.bool_
    assert crops.pixels_MCHW.shape == (2, 3, 448, 448)
    assert (crops.pixels_MCHW[1, :, :200] == -1).all()
    assert (crops.pixels_MCHW[1, :, 200:] == 1).all()
    # 200 pixels reach into the 15th row of patches: 248 pixels of padding hide 17 of 32.
    assert crops.mask_MPP[1, :15].all() and not crops.mask_MPP[1, 15:].any()
    assert crops.mask_MPP[0].all()


def test_the_global_crop_is_the_padded_grid_made_smaller():
    """Bicubic without antialiasing: at half size each pixel mixes 4 x 4 around its centre."""
    crops = load_image(picture(896, 500))
    weights = np.array([-3, 19, 19, -3]) / 32  # the cubic kernel with a = -3/4, half way
    grid = crops.pixels_MCHW[1:].reshape(2, 2, 3, 448, 448).transpose(2, 0, 3, 1, 4)
    patch = grid.reshape(3, 896, 896)[:, 199:203, 299:303]
    expected = np.einsum("chw,h,w->c", patch, weights, weights)
    np.testing.assert_allclose(crops.pixels_MCHW[0, :, 100, 150], expected, atol=1e-5)


def test_a_picture_of_one_crop_may_go_without_its_overview():
    both, alone = (load_image(picture(300, 448), overview_of_one=each) for each in (True, False))
    assert np.array_equal(both.pixels_MCHW, alone.pixels_MCHW)
    assert both.num_tokens == alone.num_tokens + 1 + 16 * 17 and not alone.overview
    wide = load_image(picture(449, 448), overview_of_one=False)
    assert wide.overview and wide.num_tokens == load_image(picture(449, 448)).num_tokens


def test_crops_are_row_by_row():
    shades = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 448, 0), 448, 1)
    crops = load_image(Image.fromarray(shades * 40))
    assert (crops.height_crops, crops.width_crops) == (2, 3)
    means = crops.pixels_MCHW[1:].mean((1, 2, 3))
    np.testing.assert_allclose(means, np.arange(6) * 40 / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "max_crops", "grid"),
    [
        ((449, 448), 36, (2, 1)),  # crops that cover it
        ((4000, 3000), 36, (4, 3)),  # 63 would cover it, and 8 x 6 of the same shape are 48
        ((3000, 3000), 36, (6, 6)),  # of the squares the largest, since it is filled
        ((50_000, 1000), 36, (36, 1)),
        ((1500, 1000), 1, (1, 1)),
    ],
)
def test_the_grid(size: tuple[int, int], max_crops: int, grid: tuple[int, int]):
    assert choose_grid(*size, max_crops=max_crops) == grid
