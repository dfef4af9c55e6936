"""Sound to the log-mel windows that Whisper was trained on.

A clip is followed by silence up to the length of its window. The spectra are those of a Hann window
of 25 ms every 10 ms, centred, the sound mirrored at its ends; the mel scale is Slaney's, straight
below 1 kHz; logarithms are cut 80 dB below the loudest. Source: Radford et al., 2022 (arXiv
2212.04356), section 2.2, and the processor published with the models.
"""

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phikit.chat.audio import RATE_HZ

FFT_SAMPLES, HOP_SAMPLES = 400, 160
LOUDEST_HZ = 8000.0
FLOOR = 1e-10
RANGE = 8.0
"""Powers of ten between the loudest and the quietest that is told apart."""


def whisper_mel(
    samples: NDArray[np.float32], *, window_samples: int, num_mels: int = 80
) -> NDArray[np.float32]:
    """The window of mono samples at 16 kHz, [window_samples / 160, mels].

    `samples` are at most `window_samples`; silence follows them.
    """
    silence = np.zeros(window_samples - len(samples), np.float32)
    window = np.pad(np.concatenate([samples, silence]), FFT_SAMPLES // 2, mode="reflect")
    frames = sliding_window_view(window, FFT_SAMPLES)[::HOP_SAMPLES][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    log = np.log10(np.maximum(power @ slaney_filters(num_mels), FLOOR))
    return ((np.maximum(log, log.max() - RANGE) + 4) / 4).astype(np.float32)


@cache
def slaney_filters(num_mels: int) -> NDArray[np.float64]:
    """Triangles of equal area, evenly spaced on Slaney's mel scale, [201 Fourier bins, mels]."""
    bins_hz = np.arange(FFT_SAMPLES // 2 + 1) * RATE_HZ / FFT_SAMPLES
    corners_hz = _hz(np.linspace(0, _mel(LOUDEST_HZ), num_mels + 2))
    low, middle, high = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    rising = (bins_hz[:, None] - low) / (middle - low)
    falling = (high - bins_hz[:, None]) / (high - middle)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2 / (high - low)


_BREAK_HZ = 1000.0
_BREAK_MEL = 15.0
_STEP = np.log(6.4) / 27
"""Growth of the logarithm of a frequency with each mel, above the break."""


def _mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz * _BREAK_MEL / _BREAK_HZ
    return _BREAK_MEL + np.log(hz / _BREAK_HZ) / _STEP


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    straight = mel * _BREAK_HZ / _BREAK_MEL
    return np.where(mel < _BREAK_MEL, straight, _BREAK_HZ * np.exp(_STEP * (mel - _BREAK_MEL)))
