"""Reading sound: formats, rates, channels, and every file that cannot be used."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from phikit.base.errors import ChatError, MissingExtraError
from phikit.chat import audio
from phikit.chat.audio import audio_clip, load_audio, log_mel, read_samples

soundfile = pytest.importorskip("soundfile", reason="reads sound files")
pytest.importorskip("soxr", reason="resamples")


def encoded(samples: np.ndarray, *, rate_hz: int, form: str = "WAV", kind: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=form, subtype=kind)
    return file.getvalue()


def sine(hz: float, *, rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)


FILES = {
    "WAV": encoded(sine(440, rate_hz=16_000), rate_hz=16_000),
    "FLAC": encoded(sine(440, rate_hz=16_000), rate_hz=16_000, form="FLAC"),
    "OGG": encoded(sine(440, rate_hz=16_000), rate_hz=16_000, form="OGG", kind="VORBIS"),
}


@pytest.mark.parametrize("form", list(FILES))
def test_formats(form: str, tmp_path: Path):
    path = tmp_path / "sound"
    path.write_bytes(FILES[form])
    clip = load_audio(path)
    assert clip.features_TF.shape == (98, 80) and clip.features_TF.dtype == np.float32
    assert clip.num_tokens == 13
    assert np.array_equal(clip.features_TF, load_audio(FILES[form]).features_TF)
    loudest = clip.features_TF.mean(axis=0).argmax()
    centres = audio.mel_filters()[:, loudest] @ np.arange(257) * 31.25
    assert centres / audio.mel_filters()[:, loudest].sum() == pytest.approx(440, abs=35)


def test_mp3(tmp_path: Path):
    """As Common Voice publishes its clips."""
    for rate_hz in (16_000, 48_000):
        tone = sine(440, rate_hz=rate_hz)
        samples = read_samples(encoded(tone, rate_hz=rate_hz, form="MP3", kind="MPEG_LAYER_III"))
        assert len(samples) == pytest.approx(16_000, abs=2_400)  # the coder pads both ends
        loudest = np.abs(np.fft.rfft(samples[4_000:12_000])).argmax() * 2
        assert loudest == pytest.approx(440, abs=4)


def test_sound_at_16_khz_is_left_as_it_is():
    samples = np.random.default_rng(0).uniform(-1, 1, 5_000).astype(np.float32)
    read = read_samples(encoded(samples, rate_hz=16_000, kind="FLOAT"))
    assert np.array_equal(read, samples)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_the_frequency(rate_hz: int):
    read = read_samples(encoded(sine(1_000, rate_hz=rate_hz), rate_hz=rate_hz, kind="FLOAT"))
    assert len(read) == 16_000
    inner = slice(2_000, 14_000)  # away from both ends, where the filter sees silence
    np.testing.assert_allclose(read[inner], sine(1_000, rate_hz=16_000)[inner], atol=1e-6)


def test_44_khz_becomes_16_khz_and_folds_nothing_back():
    """1 kHz and 10 kHz: the first stays, the second has no place below 8 kHz and goes."""
    both = 0.5 * (sine(1_000, rate_hz=44_100) + sine(10_000, rate_hz=44_100))
    read = read_samples(encoded(both, rate_hz=44_100, kind="FLOAT"))[2_000:14_000]
    spectrum = np.abs(np.fft.rfft(read * np.hanning(len(read))))
    hz = np.fft.rfftfreq(len(read), 1 / 16_000)
    assert hz[spectrum.argmax()] == 1_000
    assert spectrum[np.abs(hz - 1_000) > 20].max() < 1e-5 * spectrum.max()


def test_channels_are_averaged():
    left, right = sine(300, rate_hz=16_000), sine(2_000, rate_hz=16_000)
    read = read_samples(encoded(np.stack([left, right], 1), rate_hz=16_000, kind="FLOAT"))
    np.testing.assert_allclose(read, (left + right) / 2, atol=1e-6)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    stereo = np.random.default_rng(0).uniform(-1, 1, (60_000, 2))
    file = encoded(stereo, rate_hz=44_100)
    whole = load_audio(file).features_TF
    monkeypatch.setattr(audio, "BLOCK_SAMPLES", 1_000)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 7)
    np.testing.assert_allclose(load_audio(file).features_TF, whole, atol=1e-5)


def test_silence_has_a_floor():
    assert not log_mel(np.zeros(1_000, np.float32)).any()


def damaged(form: str) -> bytes:
    middle = len(FILES[form]) // 2
    return FILES[form][:middle] + bytes(range(256)) * 4 + FILES[form][middle + 1024 :]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "no WAV, FLAC, OGG or MP3"),
        (b"ID3\x04 a song", "damaged"),
        (b"RIFF", "damaged"),
        (FILES["WAV"][:20], "damaged"),
        (FILES["FLAC"][:-1], "damaged"),
        (FILES["OGG"][:100], "damaged"),
        (damaged("FLAC"), "damaged"),
        (damaged("OGG"), "damaged"),
        (encoded(np.zeros(0), rate_hz=16_000), "lasts 0.0 ms; the shortest clip is 25 ms"),
        (encoded(np.zeros(399), rate_hz=16_000), "lasts 24.9 ms"),
        (encoded(np.full(800, np.nan), rate_hz=16_000, kind="FLOAT"), "not numbers"),
        (encoded(np.full(800, 1e34), rate_hz=16_000, kind="FLOAT"), "a sample of 1e\\+34"),
        (encoded(np.zeros(800), rate_hz=100), "100 samples a second"),
    ],
    ids=[
        "empty",
        "mp3",
        "riff",
        "wav",
        "flac",
        "ogg",
        "flac2",
        "ogg2",
        "none",
        "short",
        "nan",
        "huge",
        "rate",
    ],
)
def test_files_that_cannot_be_used(file: bytes, message: str):
    with pytest.raises(ChatError, match=message):
        load_audio(file)


def test_a_wav_that_was_cut_short_is_read_up_to_the_cut():
    file = FILES["WAV"]
    assert len(read_samples(file[: len(file) // 2])) == 7_989


@pytest.mark.parametrize("name", ["missing.wav", "."])
def test_paths_that_cannot_be_read(name: str, tmp_path: Path):
    with pytest.raises(ChatError, match="cannot be read"):
        load_audio(tmp_path / name)


@pytest.mark.parametrize("form", list(FILES))
def test_limits(form: str):
    load_audio(FILES[form], max_seconds=1.0, max_bytes=len(FILES[form]))
    with pytest.raises(ChatError, match="longer than 0.99 s"):
        load_audio(FILES[form], max_seconds=0.99)
    with pytest.raises(ChatError, match=f"larger than {len(FILES[form]) - 1} bytes"):
        load_audio(FILES[form], max_bytes=len(FILES[form]) - 1)


def test_a_small_file_of_long_silence_is_not_decoded_to_its_end(monkeypatch: pytest.MonkeyPatch):
    file = encoded(np.zeros(2_000_000, np.int16), rate_hz=16_000, form="FLAC")
    assert len(file) < 20_000
    decoded = []
    read = soundfile.SoundFile.read

    def counted(*args, **kwargs):
        samples = read(*args, **kwargs)
        decoded.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    monkeypatch.setattr(audio, "BLOCK_SAMPLES", 16_000)
    with pytest.raises(ChatError, match="longer than 3 s"):
        load_audio(file, max_seconds=3)
    assert sum(decoded) == 4 * 16_000


def test_samples_that_are_not_numbers():
    with pytest.raises(ChatError, match="the microphone holds"):
        audio_clip(np.full(400, np.inf, np.float32), where="the microphone")


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="media") as raised:
        load_audio(FILES["WAV"])
    assert raised.value.package == package
