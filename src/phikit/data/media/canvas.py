"""Drawing with Pillow, as a pure function of a random stream: words, charts, tables, shapes.

Pictures are uint8 [H, W, 3]. What varies from picture to picture is what must not matter: font,
size, place, colours, a little noise. With each comes what is where in it (`Mark`), down to single
letters, since what was drawn is known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from phikit.base.errors import MissingExtraError
from phikit.data.media import fonts
from phikit.data.media.style import is_altered, styles_of
from phikit.data.split import Split

T = TypeVar("T")
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

PALETTES: dict[str, tuple[Colour, ...]] = {
    "tableau": ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)),
    "dark": ((27, 158, 119), (217, 95, 2), (117, 112, 179), (231, 41, 138), (102, 166, 30)),
    "accent": ((127, 201, 127), (190, 174, 212), (253, 192, 134), (56, 108, 176), (240, 2, 127)),
    "bright": ((2, 62, 255), (255, 124, 0), (26, 201, 56), (232, 0, 11), (139, 43, 226)),
    "earth": ((121, 85, 72), (85, 107, 47), (205, 133, 63), (112, 128, 144), (160, 82, 45)),
    "warm": ((178, 24, 43), (239, 138, 98), (253, 174, 97), (215, 48, 39), (244, 109, 67)),
    "muted": ((72, 120, 208), (238, 133, 74), (106, 204, 100), (214, 95, 95), (149, 108, 180)),
    "cool": ((33, 102, 172), (67, 147, 195), (1, 133, 113), (53, 151, 143), (94, 60, 153)),
}
"""Colours of bars and lines, by name; they carry no meaning, so a palette is a style."""


class Mark(NamedTuple):
    """Something in a picture: what it is, and its box in pixels from the top left corner."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


class Drawn(NamedTuple):
    """A picture and what is in it; of marks that overlap the later one lies on top."""

    picture: Picture
    marks: tuple[Mark, ...]


class Style(NamedTuple):
    """How one picture looks."""

    family: str
    file: Path
    palette: str
    ink: Colour
    paper: Colour
    stretch: float = 1.0
    """Width of words over that of the font."""
    slant: float = 0.0
    """Pixels to the right for every pixel up."""
    weight: float = 0.0
    """Pixels that all strokes are thicker by."""

    @property
    def names(self) -> tuple[str, ...]:
        """What must not be shared between splits."""
        return f"font:{self.family}", f"palette:{self.palette}"


def draw_style(random: np.random.Generator, split: Split) -> Style:
    """A font and a palette of the split, dark on light or light on dark.

    Fonts are few. Those of training are also shown narrower, wider, slanted and bolder than they
    were cut; those of the other splits as they are.
    """
    family = any_of(random, fonts.families_of(split))
    file = any_of(random, fonts.families()[family])
    palette = any_of(random, styles_of(split, "palette", PALETTES))
    dark = _colour(random, 0, 90)
    light = _colour(random, 200, 256)
    ink, paper = (light, dark) if random.random() < 0.15 else (dark, light)
    style = Style(family, file, palette, ink, paper)
    if not is_altered(random, split):
        return style
    return style._replace(
        stretch=random.uniform(0.85, 1.2),
        slant=random.uniform(-0.05, 0.15),
        weight=max(0.0, random.uniform(-0.5, 0.7)),
    )


X_HEIGHT, CAPITAL = 0.5, 0.7
"""How high small letters and capitals are, in units of a font's size; fonts differ a little."""


SHEET = 96
"""Width of pictures of words, bars and scans, so that letters are of similar size in all."""


def words(lines: Sequence[str], style: Style, random: np.random.Generator) -> Drawn:
    """Lines of text below each other, as large as the sheet lets them be."""
    width = round(SHEET / style.stretch)
    pixels = min(int(random.integers(26, 39)), 80 // len(lines))
    lean = 2 + abs(style.slant) * pixels * len(lines) / 2
    made = fonts.font(style.file, pixels)
    widest = _widest(made, lines)
    if widest > width - 2 * lean:
        pixels = int(pixels * (width - 2 * lean) / widest)
        made = fonts.font(style.file, pixels)
        widest = _widest(made, lines)
    start = random.uniform(lean, max(lean, width - lean - widest))
    row = round(1.17 * pixels)
    image, draw = _blank((width, row * len(lines) + 4), style.paper)
    marks: list[Mark] = []
    for i, line in enumerate(lines):
        at = (
            start - made.getbbox(line, anchor="ls")[0],
            2 + row * (i + 0.5) + CAPITAL / 2 * pixels,
        )
        marks += _write(draw, at, line, made, style)
    if (style.stretch, style.slant) != (1, 0):
        image, marks = _recut(image, marks, style)
    return Drawn(noisy(image, random), tuple(marks))


def _widest(made: Any, lines: Sequence[str]) -> float:
    boxes = [made.getbbox(line, anchor="ls") for line in lines]
    return max(right - left for left, _, right, _ in boxes)


def _recut(image: Any, marks: list[Mark], style: Style) -> tuple[Any, list[Mark]]:
    """A picture of words as wide as a sheet and as slanted as its style wants, and its marks."""
    wider, middle = SHEET / image.width, image.height / 2
    back = (1 / wider, style.slant, -style.slant * middle, 0, 1, 0)
    turned = _warped(image, back, width=SHEET, paper=style.paper)

    def moved(mark: Mark) -> Mark:
        shift = style.slant * (middle - (mark.top + mark.bottom) / 2)
        return mark._replace(left=wider * (mark.left + shift), right=wider * (mark.right + shift))

    return turned, [moved(mark) for mark in marks]


def bars(
    labels: Sequence[str],
    values: Sequence[int],
    style: Style,
    random: np.random.Generator,
) -> Drawn:
    """A bar chart whose bars lie, with a label before each and its value behind it."""
    pixels = int(random.integers(22, 26))
    made = fonts.font(style.file, pixels)
    axis, row = pixels + 4, pixels + 5
    longest = max(16, SHEET - axis - 10 - round(max(made.getlength(str(v)) for v in values)))
    size = (SHEET, row * len(values) + 6)
    image, draw = _blank(size, style.paper)
    draw.line([(axis, 2), (axis, size[1] - 2)], fill=style.ink)
    colours = PALETTES[style.palette]
    first = int(random.integers(len(colours)))
    marks: list[Mark] = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, end = 3 + row * (i + 0.5), axis + 1 + round(longest * value / max(values))
        fill = colours[(first + i) % len(colours)]
        draw.rectangle([axis + 1, y - 0.3 * row, end, y + 0.3 * row], fill=fill)
        line = y + CAPITAL / 2 * pixels
        marks += _write(draw, (axis - 5, line), label, made, style, anchor="r")
        marks += _write(draw, (end + 6, line), str(value), made, style)
    return Drawn(noisy(image, random), tuple(marks))


def table(rows: Sequence[Sequence[str]], style: Style, random: np.random.Generator) -> Drawn:
    """Cells in ruled lines; the first row is the head."""
    pixels = int(random.integers(13, 17))
    made = fonts.font(style.file, pixels)
    widths = [max(made.getlength(row[c]) for row in rows) + 12 for c in range(len(rows[0]))]
    height = pixels + 9
    edges = np.cumsum([4, *widths])
    image, draw = _blank((round(edges[-1]) + 5, height * len(rows) + 9), style.paper)
    marks: list[Mark] = []
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            line = 4 + height * (r + 0.5) + CAPITAL / 2 * pixels
            at = ((edges[c] + edges[c + 1]) / 2, line)
            marks += _write(draw, at, cell, made, style, anchor="m")
    for r in range(len(rows) + 1):
        draw.line([(4, 4 + height * r), (round(edges[-1]), 4 + height * r)], fill=style.ink)
    for edge in edges:
        draw.line([(round(edge), 4), (round(edge), 4 + height * len(rows))], fill=style.ink)
    return Drawn(noisy(image, random), tuple(marks))


SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, Colour] = {
    "red": (210, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 210), "yellow": (225, 195, 40),
}  # fmt: skip
"""These are asked for by name, so they are no style."""


class Shape(NamedTuple):
    """One shape, in a cell of a grid."""

    form: str
    colour: str
    row: int
    column: int


def shapes(
    things: Sequence[Shape], random: np.random.Generator, *, cell: int = 32, grid: int = 3
) -> Drawn:
    """Shapes in a grid of cells, each of its own size within its cell.

    The left of a shape's upper half is marked with its colour, and the right with its form, as if
    it were written there.
    """
    image, draw = _blank((grid * cell, grid * cell), _colour(random, 225, 256))
    marks: list[Mark] = []
    for thing in things:
        radius = cell * random.uniform(0.28, 0.42)
        shift = random.uniform(-0.06, 0.06, size=2) * cell
        x, y = (thing.column + 0.5) * cell + shift[0], (thing.row + 0.5) * cell + shift[1]
        fill = tuple(
            int(np.clip(part + random.integers(-20, 21), 0, 255)) for part in COLOURS[thing.colour]
        )
        box = [x - radius, y - radius, x + radius, y + radius]
        if thing.form == "circle":
            draw.ellipse(box, fill=fill)
        elif thing.form == "square":
            draw.rectangle(box, fill=fill)
        else:
            draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
        marks.append(Mark(f" {thing.colour}", box[0], box[1], x, y))
        marks.append(Mark(f" {thing.form}", x, box[1], box[2], y))
    return Drawn(noisy(image, random), tuple(marks))


def rewritten(scan: Picture, random: np.random.Generator) -> Picture:
    """A grey scan [H, W] on white as another hand might have written it: slanted, of another form.

    Its middle stays where it is.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "synth") from error
    height, width = scan.shape
    per_x, per_y = 1 / random.uniform(0.8, 1.15, size=2)
    slant = random.uniform(-0.2, 0.2)
    shift_x = width / 2 * (1 - per_x) - slant * height / 2
    back = (per_x, slant, shift_x, 0, per_y, height / 2 * (1 - per_y))
    return np.asarray(_warped(Image.fromarray(scan), back, width=width, paper=255))


def _warped(image: Any, back: tuple[float, ...], *, width: int, paper: Colour | int) -> Any:
    """The image moved by an affine map, of the same height; `back` leads from new places to old."""
    from PIL import Image

    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform((width, image.height), affine, back, bilinear, fillcolor=paper)


def pasted(pieces: Sequence[tuple[Picture, str, int, int]], random: np.random.Generator) -> Drawn:
    """Grey pictures [H, W] on a white square sheet: each with its name, its left and its top."""
    sheet = np.full((SHEET, SHEET), 255, np.uint8)
    marks: list[Mark] = []
    for piece, name, left, top in pieces:
        bottom, right = top + piece.shape[0], left + piece.shape[1]
        sheet[top:bottom, left:right] = piece
        marks.append(Mark(name, left, top, right, bottom))
    return Drawn(noisy(np.stack([sheet] * 3, axis=-1), random), tuple(marks))


def _write(
    draw: Any, at: tuple[float, float], text: str, made: Any, style: Style, *, anchor: str = "l"
) -> list[Mark]:
    """Draw a line of text on a baseline, and give a mark for each letter.

    A mark is as wide as its letter is set and reaches from the baseline as high as small letters
    do, about, whatever the letter: so the marks of a line have one middle.

    Args:
        at: the left end, the middle or the right end of the baseline.
        anchor: which of them: "l", "m" or "r".
    """
    draw.text(at, text, style.ink, made, f"{anchor}s", stroke_width=style.weight / 2)
    left, _, right, _ = made.getbbox(text, anchor=f"{anchor}s")
    # A box begins at the first ink, which may lie a little off the pen: spread the letters over it.
    stretch = (right - left) / max(made.getlength(text), 1e-6)
    ends = [at[0] + left + stretch * made.getlength(text[:k]) for k in range(len(text) + 1)]
    return [
        Mark(letter, ends[k], at[1] - X_HEIGHT * made.size, ends[k + 1], at[1])
        for k, letter in enumerate(text)
        if letter != " "
    ]


def noisy(image: object, random: np.random.Generator) -> Picture:
    """The picture as an array, with a little noise of the camera's kind."""
    pixels = np.asarray(image, np.float32)
    strength = random.uniform(0, 6)
    return np.clip(pixels + random.normal(0, strength, pixels.shape), 0, 255).astype(np.uint8)


def _blank(size: tuple[int, int], paper: Colour) -> tuple[Any, Any]:
    """A sheet, and what draws on it."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtraError("pillow", "synth") from error
    image = Image.new("RGB", size, paper)
    return image, ImageDraw.Draw(image)


def any_of(random: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items."""
    return items[int(random.integers(len(items)))]


def _colour(random: np.random.Generator, low: int, high: int) -> Colour:
    red, green, blue = random.integers(low, high, size=3).tolist()
    return red, green, blue
