import numpy as np
import pytest

from phikit.chat.audio import RATE_HZ, AudioClip, audio_clip, mel_centres
from phikit.data.media.augment import (
    SpecAugmentConfig,
    at_speed,
    from_throat,
    spec_augment,
    with_noise,
)

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def test_spec_augment_hides_bands_and_moments():
    features = np.random.default_rng(0).standard_normal((100, 80)).astype(np.float32)
    clip = AudioClip(features, num_tokens=13)
    before = features.copy()
    config = SpecAugmentConfig(bands=1, max_bands=20, times=1, max_share=0.2)
    for seed in range(20):
        made = spec_augment(clip, config, random=np.random.default_rng(seed))
        hidden = made.features_TF != before
        rows, columns = hidden.all(axis=1), hidden.all(axis=0)
        assert rows.sum() <= 20 and columns.sum() <= 20
        assert (hidden == (rows[:, None] | columns[None])).all()
        assert np.unique(made.features_TF[hidden]).size <= 1
        assert made.num_tokens == 13
    assert np.array_equal(features, before)
    off = SpecAugmentConfig(bands=0, times=0)
    same = spec_augment(clip, off, random=np.random.default_rng(0))
    assert np.array_equal(same.features_TF, features)


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_is_as_loud_as_asked(snr_db: float):
    noisy = with_noise(TONE, snr_db=snr_db, random=np.random.default_rng(1))
    noise = (noisy - TONE).astype(np.float64)
    found = 10 * np.log10(np.mean(TONE.astype(np.float64) ** 2) / np.mean(noise**2))
    assert found == pytest.approx(snr_db, abs=0.5)
    assert noisy.dtype == np.float32 and np.abs(noisy).max() <= 1


def test_silence_stays_finite():
    silent = np.zeros(1600, np.float32)
    assert not with_noise(silent, snr_db=10, random=np.random.default_rng(0)).any()


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_pitch(speed: float):
    faster = at_speed(TONE, speed)
    assert len(faster) == pytest.approx(16_000 / speed, abs=2)
    peak = np.abs(np.fft.rfft(faster)).argmax() * 16_000 / len(faster)
    assert peak == pytest.approx(440 * speed, abs=2)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_another_throat_moves_a_tone(factor: float):
    tone_hz = 1000.0
    samples = (0.3 * np.sin(2 * np.pi * tone_hz * np.arange(RATE_HZ) / RATE_HZ)).astype(np.float32)
    features_TF = audio_clip(samples, where="a tone").features_TF
    moved_TF = from_throat(features_TF, factor)
    assert moved_TF.shape == features_TF.shape and moved_TF.dtype == np.float32
    loudest = mel_centres()[moved_TF.mean(0).argmax()]
    assert loudest == pytest.approx(factor * tone_hz, rel=0.06)
    if factor == 1:
        np.testing.assert_array_equal(moved_TF, features_TF)
