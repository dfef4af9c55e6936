"""Fonts that come with packages: seven families of matplotlib, seventeen more of the extra `synth`.

None is taken from the system: the same seed must draw the same picture everywhere. A family belongs
to one split, its bold and slanted cuts with it.
"""

from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from phikit.base.errors import DataError, MissingExtraError
from phikit.base.packages import package_folder
from phikit.data.media.style import styles_of
from phikit.data.split import Split

if TYPE_CHECKING:
    from PIL import ImageFont

_MATPLOTLIB = "matplotlib/mpl-data/fonts/ttf"

# fmt: off
_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DejaVuSans": (_MATPLOTLIB, ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")),
    "DejaVuSerif": (
        _MATPLOTLIB,
        ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    ),
    "DejaVuSansMono": (
        _MATPLOTLIB, ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique")
    ),
    "STIXGeneral": (
        _MATPLOTLIB, ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
    ),
    "ComputerModern": (_MATPLOTLIB, ("cmr10", "cmb10", "cmti10")),
    "ComputerModernSans": (_MATPLOTLIB, ("cmss10",)),
    "ComputerModernTypewriter": (_MATPLOTLIB, ("cmtt10",)),
    "Caladea": (
        "font_caladea/files",
        ("Caladea-Regular", "Caladea-Bold", "Caladea-Italic", "Caladea-BoldItalic"),
    ),
    "FjallaOne": ("font_fjallaone/files", ("FjallaOne-Regular",)),
    "FredokaOne": ("font_fredoka_one/files", ("FredokaOne-Regular",)),
    "HankenGrotesk": (
        "font_hanken_grotesk/files",
        (
            "HankenGrotesk-Regular.otf", "HankenGrotesk-Light.otf", "HankenGrotesk-SemiBold.otf",
            "HankenGrotesk-Bold.otf", "HankenGrotesk-Italic.otf",
        ),
    ),
    "Intuitive": ("font_intuitive/files", ("Intuitive",)),
    "Lato": (
        "font_lato/files",
        ("Lato-Regular", "Lato-Light", "Lato-Bold", "Lato-Black", "Lato-Italic", "Lato-BoldItalic"),
    ),
    "Manrope": ("font_manrope/files", ("Manrope-Regular", "Manrope-Bold")),
    "RedHatDisplay": ("font_rhd/files", ("RedHatDisplay-Regular", "RedHatDisplay-Bold")),
    "Roboto": ("font_roboto/files", ("Roboto-Regular", "Roboto-Bold", "Roboto-Italic")),
    "SourceSansPro": (
        "font_source_sans_pro/files",
        (
            "SourceSansPro-Regular", "SourceSansPro-Light", "SourceSansPro-Bold",
            "SourceSansPro-Black", "SourceSansPro-It",
        ),
    ),
    "SourceSerifPro": (
        "font_source_serif_pro/files",
        (
            "SourceSerifPro-Regular", "SourceSerifPro-Light", "SourceSerifPro-Bold",
            "SourceSerifPro-Black", "SourceSerifPro-It",
        ),
    ),
    "OpenSans": (
        "ttf_opensans/ttf",
        (
            "OpenSans-Regular", "OpenSans-Light", "OpenSans-SemiBold", "OpenSans-Bold",
            "OpenSans-Italic", "OpenSans-BoldItalic",
        ),
    ),
} | {
    family: (
        "pymupdf_fonts",
        tuple(f"{family}_{cut}.py" for cut in ("Regular", "Bold", "Italic", "BoldItalic")),
    )
    for family in ("CascadiaMono", "FiraGO", "NotoSans", "SpaceMono", "Ubuntu")
}
# fmt: on
"""Of each family the folder inside an installed package, and its files there.

Computer Modern's letters and digits lie where ASCII has them. FiraMono and UbuntuMono of
pymupdf-fonts are too like two of its families to be in another split, and are left out.
"""


@cache
def families() -> dict[str, tuple[Path, ...]]:
    """The files of every family that is installed, by its name."""
    found = {name: _files(*where) for name, where in _FAMILIES.items()}
    return {name: files for name, files in found.items() if files}


def families_of(split: Split) -> list[str]:
    """The families that problems of a split may show.

    Raises MissingExtraError if there are none: matplotlib's alone serve training and testing, and
    leave nothing for validation.
    """
    try:
        return styles_of(split, "font", families())
    except DataError as error:
        raise MissingExtraError("font-rhd", "synth") from error


@cache
def font(path: Path, pixels: int) -> "ImageFont.FreeTypeFont":
    """A font at a height in pixels. Raises MissingExtraError if Pillow is not installed."""
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise MissingExtraError("pillow", "synth") from error
    if path.suffix != ".py":
        return ImageFont.truetype(str(path), pixels)
    module = import_module(f"{path.parent.name}.{path.stem}")  # holds the file as a constant
    return ImageFont.truetype(BytesIO(module.fontbuffer), pixels)


def _files(folder: str, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of these names inside a package; none unless all are there."""
    package, _, inside = folder.partition("/")
    place = package_folder(package)
    if place is None:
        return ()
    files = tuple(place / inside / (name if "." in name else f"{name}.ttf") for name in names)
    return files if all(file.is_file() for file in files) else ()
