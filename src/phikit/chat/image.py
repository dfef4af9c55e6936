"""Images as Phi-4-multimodal sees them: opened with care, then cut into crops (dynamic HD).

A picture is scaled to fill a grid of 448-pixel crops as far as its shape allows, the rest of the
grid is white, and the whole grid shrunk to one crop goes first. The numbers are those of the
processor published with the checkpoint (`processing_phi4mm.py`):

- It scales with Pillow's bilinear filter, which averages when it shrinks. The processor inside
  transformers scales tensors with torchvision instead; colours then differ slightly.
- The global crop is a bicubic resize of the padded and normalised grid *without* antialiasing.
- Transparency is dropped: what shows is the colour stored under it.

Two things are ours. Photographs are turned upright by their EXIF orientation first, as transformers
does when it loads an image. And opening is bounded: only PNG, JPEG and WebP are decoded, size is
checked before any pixel is, and damaged data is a ChatError.

Sources: InternLM-XComposer2-4KHD (arXiv 2404.06512), the choice of grid from InternVL 1.5
(2404.16821), Phi-4-Mini technical report (2503.01743) section 2.2.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from phikit.base.errors import ChatError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before decoding; the model never sees more than 7.2 million."""
MAX_BYTES = 128 * 2**20
"""Larger files are refused before reading."""
MIN_SIDE = 10
"""Fewest pixels along a side once the picture is scaled to its grid."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageCrops:
    """One image, ready for `phikit.nn.vision.ImageEmbedder`.

    Crop 0 is the whole picture, then come the crops of the grid, row by row.
    """

    pixels_MCHW: NDArray[np.float32]
    """float32 from -1 (black) to 1 (white), [1 + height_crops * width_crops, 3, 448, 448]."""
    mask_MPP: NDArray[np.bool_]
    """bool, [crops, patches, patches]: True where a patch shows some of the picture."""
    height_crops: int
    width_crops: int
    overview: bool = True
    """Whether the whole picture has a place in the sequence, behind the crops of the grid."""

    @property
    def num_tokens(self) -> int:
        """Positions the image takes in the decoder: one per 2 x 2 patches and one per row end, for
        the grid without its padding and for the overview, with a separator between them."""
        rows = int(self.mask_MPP[1 :: self.width_crops, ::2, 0].sum())
        columns = int(self.mask_MPP[1 : 1 + self.width_crops, 0, ::2].sum())
        side = self.mask_MPP.shape[1] // 2
        return rows * (columns + 1) + (1 + side * (side + 1)) * self.overview


class Grid(NamedTuple):
    """Crops along each side."""

    columns: int
    rows: int


def open_image(source: "str | Path | bytes | Image.Image") -> "Image.Image":
    """An upright RGB picture from a path, the bytes of a file, or a Pillow image.

    Of an animation it is the first frame.

    Raises:
        ChatError: no such file, another format, damaged, more than `MAX_BYTES` or `MAX_PIXELS`, or
            more than 8 bits a channel that Pillow would not scale to 8.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("pillow", "media") from error

    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(_read(source)), formats=FORMATS)
        _check(image, name)
        upright = ImageOps.exif_transpose(image)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ChatError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ChatError(
            f"{name} has more than {MAX_PIXELS:,} pixels", fix="scale it down"
        ) from error
    except UnidentifiedImageError as error:
        raise ChatError(
            f"{name} is no PNG, JPEG or WebP image", fix="convert it to one of these"
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged data
        raise ChatError(f"{name} cannot be read: {error}", fix="give an undamaged image") from error


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the image"


def _read(source: str | Path | bytes) -> bytes:
    """The bytes of a file, or those given, if they are not too many."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise ChatError(f"there is no file {path}", fix="give the path of an image")
        size = path.stat().st_size
    if size > MAX_BYTES:
        raise ChatError(
            f"{_name(source)} has {size:,} bytes; at most {MAX_BYTES:,} are read",
            fix="scale it down, or save it as JPEG",
        )
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _check(image: "Image.Image", name: str) -> None:
    """Raise ChatError for what must not or cannot be decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ChatError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded",
            fix="scale it down",
        )
    if not width * height:
        raise ChatError(f"{name} has {width} x {height} pixels", fix="give a picture")
    if image.mode.startswith(("I", "F")):
        raise ChatError(
            f"{name} has more than 8 bits a channel (Pillow mode {image.mode})",
            fix="save it with 8 bits a channel",
        )


def load_image(
    source: "str | Path | bytes | Image.Image",
    *,
    max_crops: int = 36,
    crop_size: int = 448,
    patch_size: int = 14,
    overview_of_one: bool = True,
) -> ImageCrops:
    """Open an image and cut it into at most `max_crops` crops and a global one.

    Args:
        source: a path, the bytes of a file, or a Pillow image; see `open_image`.
        max_crops: 36 as in the checkpoint's processor; fewer cost fewer tokens and less time.
        crop_size: side of a crop in pixels, a multiple of twice `patch_size`.
        patch_size: side of a patch in pixels.
        overview_of_one: whether a picture of one crop has an overview too, which then shows the
            same once more.

    Raises:
        ChatError: the image cannot be opened, or is too long and thin for its grid.
    """
    if max_crops < 1:
        raise ChatError(f"max_crops is {max_crops}", fix="allow at least one crop")
    image = open_image(source)
    grid = choose_grid(*image.size, max_crops=max_crops, crop_size=crop_size)
    size = fit(*image.size, grid=grid, crop_size=crop_size)
    if min(size) < MIN_SIDE:
        raise ChatError(
            f"{_name(source)} of {image.width} x {image.height} pixels would be scaled to "
            f"{size[0]} x {size[1]}, thinner than {MIN_SIDE}",
            fix="crop it, or join it with its surroundings",
        )
    pixels_CHW = _normalised_grid(image, size, grid, crop_size)
    crops = tiles(pixels_CHW, crop_size)
    global_crop = F.interpolate(
        torch.from_numpy(pixels_CHW)[None], size=(crop_size, crop_size), mode="bicubic"
    ).numpy()
    patches = crop_size // patch_size
    mask = np.ones((1, grid.rows * patches, grid.columns * patches), dtype=np.bool_)
    # A patch with any of the picture in it counts, so padding is rounded down to whole patches.
    mask[:, mask.shape[1] - (grid.rows * crop_size - size[1]) // patch_size :] = False
    mask[:, :, mask.shape[2] - (grid.columns * crop_size - size[0]) // patch_size :] = False
    full = np.ones((1, patches, patches), dtype=np.bool_)
    return ImageCrops(
        pixels_MCHW=np.concatenate([global_crop, crops]),
        mask_MPP=np.concatenate([full, tiles(mask, patches)[:, 0]]),
        height_crops=grid.rows,
        width_crops=grid.columns,
        overview=overview_of_one or len(crops) > 1,
    )


def choose_grid(width: int, height: int, *, max_crops: int, crop_size: int = 448) -> Grid:
    """The crops that cover the picture, or where they are too many the grid nearest in shape.

    Of grids equally near, a larger one wins if it is less than twice the picture's area.
    """
    columns, rows = math.ceil(width / crop_size), math.ceil(height / crop_size)
    if columns * rows <= max_crops:
        return Grid(columns, rows)
    grids = [
        Grid(columns, rows)
        for columns in range(1, max_crops + 1)
        for rows in range(1, max_crops // columns + 1)
    ]
    best, least = Grid(1, 1), math.inf
    for grid in sorted(grids, key=lambda grid: grid.columns * grid.rows):
        distance = abs(width / height - grid.columns / grid.rows)
        fills = width * height > 0.5 * crop_size**2 * grid.columns * grid.rows
        if distance < least or (distance == least and fills):
            best, least = grid, distance
    return best


def fit(width: int, height: int, *, grid: Grid, crop_size: int = 448) -> tuple[int, int]:
    """Width and height of the picture once scaled, in its shape, to the inside of the grid."""
    full_width, full_height = grid.columns * crop_size, grid.rows * crop_size
    scale_x, scale_y = full_width / width, full_height / height
    if scale_x < scale_y:
        return full_width, int(height * scale_x)
    return int(width * scale_y), full_height


def _normalised_grid(
    image: "Image.Image", size: tuple[int, int], grid: Grid, crop_size: int
) -> NDArray[np.float32]:
    """The scaled picture at the top left of a white grid, as float32 [C, H, W] in -1..1."""
    from PIL import Image

    width, height = size
    canvas_HWC = np.full((grid.rows * crop_size, grid.columns * crop_size, 3), 255, dtype=np.uint8)
    canvas_HWC[:height, :width] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    pixels_CHW = np.ascontiguousarray(canvas_HWC.transpose(2, 0, 1), dtype=np.float32)
    pixels_CHW /= 255
    pixels_CHW -= 0.5
    pixels_CHW /= 0.5
    return pixels_CHW


def tiles(planes_CHW: NDArray[Any], side: int) -> NDArray[Any]:
    """Square tiles of stacked planes, row by row, [M, C, side, side]."""
    planes, height, width = planes_CHW.shape
    grid = planes_CHW.reshape(planes, height // side, side, width // side, side)
    return grid.transpose(1, 3, 0, 2, 4).reshape(-1, planes, side, side)
