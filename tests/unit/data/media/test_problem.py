"""From problems to examples; what cannot be read is named, and stops the work or is counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bad_media import BAD, wav
from tests.modalities import HEARS, SEES

from phikit.base.errors import ConfigError, DataError, MissingExtraError
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


def test_what_is_too_long_for_the_model_is_a_fault(nano_tokenizer):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    problems = generate(family="shapes", seed=0, count=2, split="train")
    given: dict[str, Any] = {"modalities": MODALITIES, "ids": IDS}
    longest = max(map(len, prepare(problems, renderer, **given).examples))
    assert not prepare(problems, renderer, max_tokens=longest, **given).faults
    made = prepare(problems, renderer, max_tokens=longest - 1, on_fault="skip", **given)
    assert made.faults and f"the model takes {longest - 1}" in made.faults[0].reason
    assert len(made.examples) == len(made.problems) == 2 - len(made.faults)


def test_a_package_that_is_missing_is_no_fault_of_the_items(nano_tokenizer):
    def prepares(source: Any) -> MediaItem:
        raise MissingExtraError("pillow", "media")

    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    with pytest.raises(MissingExtraError, match="pillow"):
        prepare(
            [problem(VISION, b"")],
            renderer,
            modalities={VISION: prepares},
            ids=IDS,
            on_fault="skip",
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
    with pytest.raises(ConfigError, match="without the modality 'speech'"):
        prepare([spoken], renderer, modalities=sees, ids=IDS, on_fault="skip")
    mute = replace(spoken, solution=None)
    with pytest.raises(DataError, match="no solution"):
        prepare([mute], renderer, modalities=MODALITIES, ids=IDS)
