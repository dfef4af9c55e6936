"""From problems to examples; what cannot be read is named, and stops the work or is counted."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from tests.modalities import HEARS, SEES

from phikit.base.errors import DataError
from phikit.base.media import SPEECH, VISION, MediaItem
from phikit.chat.render import renderer_for
from phikit.data.media.generate import generate
from phikit.data.media.problem import MediaProblem, prepare
from phikit.data.problem import Provenance
from phikit.models.senses import SpeechModality, VisionModality

IDS = {"image": 900, "audio": 901}
MODALITIES: dict[str, Callable[[Any], MediaItem]] = {
    VISION: VisionModality(encoder=SEES, max_crops=4).prepare,
    SPEECH: SpeechModality(encoder=HEARS, max_seconds=60).prepare,
}


def problem(modality: str, source: Any, index: int = 7) -> MediaProblem:
    word = {VISION: "image", SPEECH: "audio"}[modality]
    where = Provenance("album", "", "", "train", "test", "1", 0, index)
    question = f"<|{word}_1|>What?"
    return MediaProblem(question, "yes", None, "yes", None, "s", where, media={modality: (source,)})


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
    "another format": (SPEECH, b"ID3 hello", "no WAV, FLAC or OGG"),
    "stereo array": (SPEECH, np.zeros((2, 4000), np.float32), "of shape"),
    "long array": (SPEECH, np.zeros(61 * 16_000, np.float32), "longer than 60 s"),
    "not a number": (SPEECH, np.full(8000, np.nan, np.float32), "not numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_stops_the_work_and_is_named(nano_tokenizer, name: str):
    modality, source, reason = BAD[name]
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    with pytest.raises(DataError, match=rf"album, item 7: .*{reason}"):
        prepare([problem(modality, source)], renderer, modalities=MODALITIES, ids=IDS)


def test_or_is_skipped_and_counted(nano_tokenizer, tmp_path: Path):
    """Nothing is lost: every problem is an example or a fault."""
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    good = generate(family="shapes", seed=0, count=3, split="train")
    bad = [problem(modality, source, i) for i, (modality, source, _) in enumerate(BAD.values())]
    gone = problem(VISION, tmp_path / "gone.png")
    found = prepare(
        [good[0], *bad, good[1], gone, good[2]],
        renderer,
        modalities=MODALITIES,
        ids=IDS,
        on_fault="skip",
    )
    assert len(found.examples) == 3
    assert [fault.item for fault in found.faults] == [
        *(f"album, item {i}" for i in range(len(BAD))), str(tmp_path / "gone.png"),
    ]  # fmt: skip
    assert "there is no file" in found.faults[-1].reason


def test_a_missing_file_is_named(nano_tokenizer, tmp_path: Path):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    for modality in MODALITIES:
        with pytest.raises(DataError, match="gone.file"):
            prepare(
                [problem(modality, tmp_path / "gone.file")],
                renderer,
                modalities=MODALITIES,
                ids=IDS,
            )


def test_any_rate_is_resampled(nano_tokenizer):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    lengths = []
    for rate_hz in (8000, 16_000, 44_100, 48_000):
        tone = 0.2 * np.sin(2 * np.pi * 300 * np.arange(rate_hz) / rate_hz)
        made = prepare(
            [problem(SPEECH, wav(tone, rate_hz))], renderer, modalities=MODALITIES, ids=IDS
        )
        [example] = made.examples
        assert example.media is not None
        lengths.append(example.media.clips[0].num_tokens)
    assert lengths == [13] * 4


@pytest.mark.parametrize("family", ["text", "spoken_digits", "spoken_scene"])
def test_examples_hold_media_and_learn_the_answer(nano_tokenizer, family: str):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    problems = generate(family=family, seed=0, count=3, split="train")
    made = prepare(problems, renderer, modalities=MODALITIES, ids=IDS)
    assert not made.faults
    for given, example in zip(problems, made.examples, strict=True):
        assert example.media is not None and [*example.media.items] == [*given.media]
        counts = example.media.tokens.counts
        for word, id_ in IDS.items():
            where = example.tokens == id_
            assert where.sum() == sum(counts[word]) and not example.loss_mask[where].any()
        learnt = example.tokens[example.loss_mask].tolist()
        assert renderer.parse(learnt).content == given.answer


def test_a_model_that_cannot_hear_says_so(nano_tokenizer):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    sees = {VISION: MODALITIES[VISION]}
    [spoken] = generate(family="command", seed=0, count=1, split="train")
    with pytest.raises(DataError, match="without the modality 'speech'"):
        prepare([spoken], renderer, modalities=sees, ids=IDS)
    mute = replace(spoken, solution=None)
    with pytest.raises(DataError, match="no solution"):
        prepare([mute], renderer, modalities=MODALITIES, ids=IDS)
