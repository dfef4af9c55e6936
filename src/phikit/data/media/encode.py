"""Media as the bytes of a file, without loss: what is stored is what is read again, bit for bit.

Files keep the bytes they have. Pixels become PNG. Samples become WAV of 32-bit floats, whose header
is written here: libsndfile's holds the time of day, so that no two files would be equal.
"""

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phikit.base.errors import DataError, MissingExtraError
from phikit.chat.audio import MAX_BYTES, MP3, RATE_HZ
from phikit.data.media.problem import Source, Stored

MAX_ITEM_BYTES = MAX_BYTES
"""Larger items are neither written nor read."""
IEEE_FLOAT = 3
MAGIC = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"fLaC": "flac",
    b"OggS": "ogg",
    **dict.fromkeys(MP3, "mp3"),
}


def file_bytes(source: Source, *, where: str) -> bytes:
    """The bytes of a file that hold the source.

    Raises:
        DataError: a file cannot be read or is too large, or no file format holds such an array.
        MissingExtraError: Pillow is needed and not installed.
    """
    if isinstance(source, Stored):
        source = source.load()
    if isinstance(source, Path):
        return _read(source)
    if isinstance(source, bytes):
        return source
    if source.ndim == 1 and source.dtype == np.float32:
        return wav(source, rate_hz=RATE_HZ)
    if source.ndim == 3 and source.shape[2] == 3 and source.dtype == np.uint8:
        return png(source)
    raise DataError(
        f"{where}: no file format is known for {source.dtype} of shape {source.shape}",
        fix="give such items as the bytes of a file",
    )


def suffix_of(data: bytes) -> str:
    """What files of this content are called, by their first bytes."""
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "wav"
    return next((name for magic, name in MAGIC.items() if data.startswith(magic)), "bin")


def png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """Pixels as a PNG file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "media") from error
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


def wav(samples: NDArray[np.float32], *, rate_hz: int) -> bytes:
    """Mono samples as a WAV file of 32-bit floats."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", IEEE_FLOAT, 1, rate_hz, 4 * rate_hz, 4, 32)
    chunks = b"".join(
        name + struct.pack("<I", len(body)) + body
        for name, body in ((b"fmt ", form), (b"data", data))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_ITEM_BYTES:
            raise DataError(f"{path} is larger than {MAX_ITEM_BYTES} bytes", fix="make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
