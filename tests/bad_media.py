"""Pictures and sounds that cannot be taken, and why."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from phikit.base.media import SPEECH, VISION


def wav(samples: np.ndarray, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV")
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """The head of a PNG and no pixels: what a decompression bomb looks like before it goes off."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + b"\0\0\0\0"


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


BAD: dict[str, tuple[str, Any, str]] = {
    "corrupt image": (VISION, picture(40, 40)[:60], "cannot be read"),
    "no image": (VISION, b"hello", "no PNG, JPEG or WebP"),
    "20,000 pixels a side": (VISION, png_that_claims(20_000, 20_000), "64,000,000 pixels"),
    "20,000 pixels, thin": (VISION, picture(20_000, 2), "thinner than 10"),
    "decompression bomb": (VISION, png_that_claims(2**31 - 1, 2**31 - 1), "pixels"),
    "pixels as floats": (VISION, np.zeros((4, 4, 3)), "float64 of shape"),
    "no sound": (SPEECH, wav(np.zeros(0), 16_000), "lasts 0.0 ms"),
    "half an hour": (SPEECH, wav(np.zeros(1800 * 8000, np.int16), 8000), "longer than 60 s"),
    "too few samples a second": (SPEECH, wav(np.zeros(4000), 2000), "2000 samples a second"),
    "cut off": (SPEECH, wav(np.zeros(4000), 16_000)[:20], "damaged"),
    "another format": (SPEECH, b"MThd hello", "no WAV, FLAC, OGG or MP3"),
    "stereo array": (SPEECH, np.zeros((2, 4000), np.float32), "of shape"),
    "long array": (SPEECH, np.zeros(61 * 16_000, np.float32), "longer than 60 s"),
    "not a number": (SPEECH, np.full(8000, np.nan, np.float32), "not numbers"),
}
