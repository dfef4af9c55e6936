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
from phikit.data.media.style import style_split, styles_of
from phikit.data.split import Split

if TYPE_CHECKING:
    from PIL import ImageFont

# fmt: off
_MATPLOTLIB = {
    "DejaVuSans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    "DejaVuSerif": (
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"
    ),
    "DejaVuSansMono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    "STIXGeneral": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "ComputerModern": ("cmr10", "cmb10", "cmti10"),
    "ComputerModernSans": ("cmss10",),
    "ComputerModernTypewriter": ("cmtt10",),
}
"""Files of each family. Computer Modern's letters and digits lie where ASCII has them."""
_PACKAGES = {
    "Caladea": (
        "font_caladea", ("Caladea-Regular", "Caladea-Bold", "Caladea-Italic", "Caladea-BoldItalic")
    ),
    "FjallaOne": ("font_fjallaone", ("FjallaOne-Regular",)),
    "FredokaOne": ("font_fredoka_one", ("FredokaOne-Regular",)),
    "HankenGrotesk": (
        "font_hanken_grotesk",
        (
            "HankenGrotesk-Regular.otf", "HankenGrotesk-Light.otf", "HankenGrotesk-SemiBold.otf",
            "HankenGrotesk-Bold.otf", "HankenGrotesk-Italic.otf",
        ),
    ),
    "Intuitive": ("font_intuitive", ("Intuitive",)),
    "Lato": (
        "font_lato",
        ("Lato-Regular", "Lato-Light", "Lato-Bold", "Lato-Black", "Lato-Italic", "Lato-BoldItalic"),
    ),
    "Manrope": ("font_manrope", ("Manrope-Regular", "Manrope-Bold")),
    "RedHatDisplay": ("font_rhd", ("RedHatDisplay-Regular", "RedHatDisplay-Bold")),
    "Roboto": ("font_roboto", ("Roboto-Regular", "Roboto-Bold", "Roboto-Italic")),
    "SourceSansPro": (
        "font_source_sans_pro",
        (
            "SourceSansPro-Regular", "SourceSansPro-Light", "SourceSansPro-Bold",
            "SourceSansPro-Black", "SourceSansPro-It",
        ),
    ),
    "SourceSerifPro": (
        "font_source_serif_pro",
        (
            "SourceSerifPro-Regular", "SourceSerifPro-Light", "SourceSerifPro-Bold",
            "SourceSerifPro-Black", "SourceSerifPro-It",
        ),
    ),
}
"""The package of each family, and files in its folder `files`."""
_OPEN_SANS = (
    "OpenSans-Regular", "OpenSans-Light", "OpenSans-SemiBold", "OpenSans-Bold", "OpenSans-Italic",
    "OpenSans-BoldItalic",
)
_PYMUPDF = {"CascadiaMono", "FiraGO", "NotoSans", "SpaceMono", "Ubuntu"}
"""Families of pymupdf-fonts, four cuts each. FiraMono and UbuntuMono are too near to two of them to
be in another split."""
# fmt: on


@cache
def families() -> dict[str, tuple[Path, ...]]:
    """The files of every family that is installed, by its name."""
    found = {}
    core = _folder("matplotlib", "mpl-data/fonts/ttf")
    if core is not None:
        found |= {name: _files(core, names) for name, names in _MATPLOTLIB.items()}
    for name, (package, names) in _PACKAGES.items():
        folder = _folder(package, "files")
        if folder is not None:
            found[name] = _files(folder, names)
    if (folder := _folder("ttf_opensans", "ttf")) is not None:
        found["OpenSans"] = _files(folder, _OPEN_SANS)
    if (folder := package_folder("pymupdf_fonts")) is not None:
        for name in sorted(_PYMUPDF):
            cuts = ("Regular", "Bold", "Italic", "BoldItalic")
            found[name] = _files(folder, tuple(f"{name}_{cut}.py" for cut in cuts))
    return {name: files for name, files in found.items() if files}


def families_of(split: Split) -> list[str]:
    """The families that problems of a split may show.

    Raises DataError if there are none: matplotlib's alone serve training and testing, and leave
    nothing for validation.
    """
    try:
        return styles_of(split, "font", families())
    except DataError as error:
        raise MissingExtraError("font-rhd", "synth") from error


def family_split(family: str) -> Split:
    """The split that a family belongs to."""
    return style_split("font", family)


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


def _files(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of these names; none unless all are there."""
    files = tuple(folder / (name if "." in name else f"{name}.ttf") for name in names)
    return files if all(file.is_file() for file in files) else ()


def _folder(package: str, inside: str) -> Path | None:
    """A folder inside an installed package."""
    folder = package_folder(package)
    return None if folder is None else folder / inside
