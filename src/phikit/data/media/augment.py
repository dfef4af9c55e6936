"""Speech made harder: noise, another pace, masked bands and stretches of its spectrogram.

Sources: SpecAugment (Park et al., 2019, arXiv 1904.08779), without its time warping, which they
found to matter least; speed perturbation (Ko et al., 2015).
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from phikit.base.config import Config
from phikit.base.errors import MissingExtraError
from phikit.chat.audio import RATE_HZ, AudioClip
from phikit.data.media.speak import Samples

SPEEDS = (0.9, 1.0, 1.1)


class SpecAugmentConfig(Config):
    """How much of a spectrogram is hidden; the defaults are mild, for clips of a few seconds."""

    bands: int = 2
    """Stretches of neighbouring mel bands."""
    max_bands: int = 12
    """Widest of them."""
    times: int = 2
    max_share: float = 0.1
    """Longest of them, of the clip."""


def spec_augment(
    clip: AudioClip, config: SpecAugmentConfig, *, random: np.random.Generator
) -> AudioClip:
    """The clip with some bands and some moments at its mean; the length stays."""
    features_TF = clip.features_TF.copy()
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
