"""Sound files to the log-mel features that Phi-4-multimodal was trained on.

What is unusual in the features, all of it Microsoft SpeechLib's: pre-emphasis works inside each
frame, the window is the symmetric Hamming, nothing is padded, the triangles are straight on the mel
scale and end one Fourier bin below the top, powers are those of 16-bit samples with a floor of one.

Sound of any rate is resampled properly. The published processor halves 44.1 kHz to 22.05 kHz and
calls the result 16 kHz, so speech comes out slow and low.

Source: Phi-4-Mini technical report (arXiv 2503.01743), section 2.2, and the processor published
with Phi-4-multimodal-instruct.
"""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phikit.base.callbacks import out_of_reach
from phikit.base.errors import ChatError, MissingExtraError

RATE_HZ = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SAMPLES = 512
NUM_MELS = 80
TOP_HZ = 7690
PRE_EMPHASIS = 0.97
FRAMES_PER_TOKEN = 8
"""The speech encoder makes one token of this many frames, or of what is left at the end."""

MAX_SECONDS = 1800.0
"""Half an hour, the longest speech in the model's training data."""
MAX_BYTES = 512 << 20
"""Half an hour of uncompressed stereo at 48 kHz and 16 bits is 346 MB."""
MP3 = (b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
"""With tags, and without."""
MAGIC = (b"RIFF", b"fLaC", b"OggS", *MP3)
MAX_LEVEL = 1e6
"""Of a sample, where 1 is full scale; beyond it the energies of a frame are no float32."""
RATES_HZ = range(4_000, 384_001)
BLOCK_SAMPLES = 1 << 20
"""Decoded at once, over all channels."""
BLOCK_FRAMES = 3_000
"""Transformed at once: 30 s, whose spectra take 25 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class AudioClip:
    """One clip, as the model is given it."""

    features_TF: NDArray[np.float32]
    """Log-mel energies, a frame every 10 ms."""
    num_tokens: int
    """Places the clip takes in the prompt, 80 ms each."""


def load_audio(
    source: Any, *, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> AudioClip:
    """The clip of a path, of a file's bytes, or of samples; arguments and errors are those of both
    steps: `samples_of`, then `audio_clip`."""
    samples, where = samples_of(source, max_seconds=max_seconds, max_bytes=max_bytes)
    return audio_clip(samples, where=where)


def read_samples(
    source: bytes | Path, *, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> NDArray[np.float32]:
    """Mono samples at 16 kHz, channels averaged, of a WAV, FLAC, OGG or MP3 file.

    A WAV or OGG file that was cut short is read up to the cut.

    Args:
        source: the file's bytes or its path.
        max_seconds: longer sound is refused, and not decoded beyond this.
        max_bytes: a larger file is refused unopened.

    Raises:
        ChatError: no such file, damaged, of another format, or beyond a limit.
        MissingExtraError: soundfile or soxr is not installed.
    """

    def decoded() -> NDArray[np.float32]:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            return _decode(file, _name(source), max_seconds)

    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > max_bytes:
            raise ChatError(
                f"{_name(source)} is larger than {max_bytes} bytes", fix="give a shorter clip"
            )
        return out_of_reach(decoded)  # the decoder reads through callbacks
    except (OSError, ValueError) as error:  # the latter for a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ChatError(f"{_name(source)} cannot be read: {reason}") from error


def samples_of(
    source: Any, *, max_seconds: float, max_bytes: int = MAX_BYTES
) -> tuple[NDArray[np.float32], str]:
    """Mono samples at 16 kHz of what people have, and what to call it in messages.

    That is a path, the bytes of a file, or such samples as float32. Errors are those of
    `read_samples`.
    """
    if isinstance(source, bytes | str | Path):
        file = Path(source) if isinstance(source, str) else source
        return read_samples(file, max_seconds=max_seconds, max_bytes=max_bytes), _name(file)
    if not isinstance(source, np.ndarray):
        raise ChatError(
            f"a clip is given as {type(source).__name__}", fix="give the bytes or the path"
        )
    if source.ndim != 1 or source.dtype != np.float32:
        raise ChatError(
            f"samples are {source.dtype} of shape {source.shape}",
            fix="give mono samples at 16 kHz as float32",
        )
    if len(source) > max_seconds * RATE_HZ:
        raise ChatError(f"the samples are longer than {max_seconds:g} s", fix="give a shorter clip")
    return source, "the samples"


def audio_clip(samples: NDArray[np.float32], *, where: str = "the audio") -> AudioClip:
    """The clip of mono samples at 16 kHz between -1 and 1; `where` is its name in messages.

    Raises:
        ChatError: less than one window (25 ms) of sound, or samples that are not finite.
    """
    check_samples(samples, where=where)
    features_TF = log_mel(samples)
    return AudioClip(features_TF, num_tokens=-(-len(features_TF) // FRAMES_PER_TOKEN))


def check_samples(samples: NDArray[np.float32], *, where: str) -> None:
    """Raise ChatError for less than 25 ms of sound, or samples that are not finite or huge."""
    if len(samples) < WINDOW_SAMPLES:
        raise ChatError(
            f"{where} lasts {1000 * len(samples) / RATE_HZ:.1f} ms; "
            f"the shortest clip is {1000 * WINDOW_SAMPLES // RATE_HZ} ms"
        )
    if not np.isfinite(samples).all():
        raise ChatError(f"{where} holds samples that are not numbers", fix="export it again")
    if (level := float(np.abs(samples).max())) > MAX_LEVEL:
        raise ChatError(f"{where} has a sample of {level:g}, where 1 is full scale", fix="scale it")


def log_mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural logarithms of mel energies, [T, 80] with T = (samples - 400) // 160 + 1."""
    frames = sliding_window_view(samples, WINDOW_SAMPLES)[::HOP_SAMPLES]
    starts = range(0, len(frames), BLOCK_FRAMES)
    return np.concatenate([_log_mel(frames[start : start + BLOCK_FRAMES]) for start in starts])


@cache
def mel_filters() -> NDArray[np.float64]:
    """Triangles evenly spaced on the mel scale, [257 Fourier bins, 80 bands].

    SpeechLib takes the bins from 1 up to, not including, the one nearest to the top frequency.
    """
    bin_hz = RATE_HZ / FFT_SAMPLES
    spacing = _mel(TOP_HZ) / (NUM_MELS + 1)
    bins = np.arange(1, round(TOP_HZ / bin_hz))
    distance = _mel(bins * bin_hz)[:, None] / spacing - np.arange(1, NUM_MELS + 1)
    filters = np.zeros((FFT_SAMPLES // 2 + 1, NUM_MELS))
    filters[bins] = np.maximum(0.0, 1.0 - np.abs(distance))
    return filters


@cache
def mel_centres() -> NDArray[np.float64]:
    """Where the bands have their middle, in Hz, [80]."""
    mels = _mel(TOP_HZ) / (NUM_MELS + 1) * np.arange(1, NUM_MELS + 1)
    return 700.0 * np.expm1(mels / 1127.0)


def _mel(hz: Any) -> Any:
    return 1127.0 * np.log1p(hz / 700.0)


def _log_mel(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    emphasised = (frames - PRE_EMPHASIS * previous) * 32768
    spectrum = np.fft.rfft(emphasised * np.hamming(WINDOW_SAMPLES), n=FFT_SAMPLES)
    power = spectrum.real**2 + spectrum.imag**2
    return np.log(np.maximum(power @ mel_filters(), 1.0)).astype(np.float32)


def _name(source: bytes | Path) -> str:
    return f"the audio of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _decode(file: BinaryIO, where: str, max_seconds: float) -> NDArray[np.float32]:
    """Block by block, so that a small file of much silence cannot fill the memory."""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise MissingExtraError(error.name or "soundfile", "media") from error
    if not file.read(4).startswith(MAGIC):
        raise ChatError(
            f"{where} is no WAV, FLAC, OGG or MP3 file", fix="convert it to one of these"
        )
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            rate_hz, block = sound.samplerate, max(1, BLOCK_SAMPLES // sound.channels)
            if rate_hz not in RATES_HZ:
                raise ChatError(
                    f"{where} has {rate_hz} samples a second, not {RATES_HZ[0]} to {RATES_HZ[-1]}"
                )
            resampler = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")
            parts, decoded = [], 0
            while len(samples := sound.read(block, dtype="float32", always_2d=True)):
                decoded += len(samples)
                if decoded > max_seconds * rate_hz:
                    raise ChatError(
                        f"{where} is longer than {max_seconds:g} s", fix="give a shorter clip"
                    )
                parts.append(resampler.resample_chunk(samples.mean(axis=1)))
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)
        raise ChatError(f"{where} is damaged: {reason}", fix="export it again") from error
    parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts)
