"""Speech made harder: noise, another pace, another throat, masked parts of its spectrogram.

Sources: SpecAugment (Park et al., 2019, arXiv 1904.08779), without its time warping, which they
found to matter least; speed perturbation (Ko et al., 2015); vocal tract length perturbation (Jaitly
and Hinton, 2013).
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt

from phikit.base.config import Config
from phikit.base.errors import ConfigError, MissingExtraError
from phikit.chat.audio import RATE_HZ, AudioClip, mel_centres
from phikit.data.media.speak import Samples

SPEEDS = (0.9, 1.0, 1.1)


class SpecAugmentConfig(Config):
    """How a spectrogram is altered; the defaults are mild, for clips of a few seconds."""

    bands: NonNegativeInt = 2
    """Stretches of neighbouring mel bands."""
    max_bands: NonNegativeInt = 12
    """Widest of them."""
    times: NonNegativeInt = 2
    max_share: float = Field(default=0.1, ge=0, le=1)
    """Longest of them, of the clip."""
    throat: float = Field(default=0.0, ge=0, lt=1)
    """Up to this share the vocal tract becomes shorter or longer, and all frequencies higher or
    lower with it: as many speakers more."""


def spec_augment(
    clip: AudioClip, config: SpecAugmentConfig, *, random: np.random.Generator
) -> AudioClip:
    """The clip from another throat, some bands and some moments at its mean; the length stays."""
    features_TF = clip.features_TF.copy()
    if config.throat:
        features_TF = from_throat(features_TF, 1 + random.uniform(-config.throat, config.throat))
    mean = features_TF.mean()
    frames, mels = features_TF.shape
    for _ in range(config.bands):
        width = int(random.integers(0, min(config.max_bands, mels) + 1))
        start = int(random.integers(0, mels - width + 1))
        features_TF[:, start : start + width] = mean
    for _ in range(config.times):
        width = int(random.integers(0, int(config.max_share * frames) + 1))
        start = int(random.integers(0, frames - width + 1))
        features_TF[start : start + width] = mean
    return replace(clip, features_TF=features_TF)


def from_throat(features_TF: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Log-mel energies [T, F] with all frequencies times `factor`; the ends are drawn out.

    Raises ConfigError for other bands than those of `chat.audio`.
    """
    centres = mel_centres()
    if features_TF.shape[1] != len(centres):
        raise ConfigError(
            f"throat: it knows {len(centres)} mel bands, and clips have {features_TF.shape[1]}",
            fix="set throat to 0",
        )
    places = np.interp(centres / factor, centres, np.arange(len(centres)))
    below = places.astype(np.int64)
    above = np.minimum(below + 1, len(centres) - 1)
    share = (places - below).astype(np.float32)
    drawn_TF = features_TF[:, below] * (1 - share) + features_TF[:, above] * share
    return drawn_TF.astype(np.float32)


def with_noise(samples: Samples, *, snr_db: float, random: np.random.Generator) -> Samples:
    """The sound under noise of that ratio, between white and pink in colour."""
    spectrum = np.fft.rfft(random.standard_normal(len(samples)))
    tilt = random.uniform(0.0, 0.5)
    spectrum /= np.maximum(np.arange(len(spectrum)), 1.0) ** tilt
    noise = np.fft.irfft(spectrum, n=len(samples))
    wanted = _power(samples) / 10 ** (snr_db / 10)
    mixed = samples + noise * np.sqrt(wanted / max(_power(noise), 1e-12))
    return np.clip(mixed, -1, 1).astype(np.float32)


def at_speed(samples: Samples, speed: float) -> Samples:
    """The sound faster or slower, and higher or lower with it, as a tape would play it.

    Raises MissingExtraError if soxr is not installed.
    """
    if speed == 1.0:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("soxr", "synth") from error
    return np.asarray(soxr.resample(samples, RATE_HZ * speed, RATE_HZ), np.float32)


def _power(samples: NDArray[np.floating]) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))
