"""Generated problems: the same bits from one seed, exact answers, splits that share nothing."""

import itertools
import re
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phikit.base.errors import ConfigError, DataError
from phikit.base.media import SPEECH, VISION, word_of
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.data.media import canvas, fonts
from phikit.data.media import generate as media_generate
from phikit.data.media.generate import FAMILIES, generate, scans_of
from phikit.data.media.problem import MediaProblem, length_buckets, spelt
from phikit.data.media.speak import SPEAKERS, Voice, speak
from phikit.data.media.style import style_split, styles_of
from phikit.data.problem import assert_disjoint
from phikit.data.split import Split

SPLITS: tuple[Split, ...] = ("train", "rl", "validation", "test")
COUNT = 6


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, Split], list[MediaProblem]]:
    return {
        (family, split): generate(family=family, seed=3, count=COUNT, split=split)
        for family in FAMILIES
        for split in SPLITS
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_neither_content_nor_looks(made, family: str):
    assert_disjoint(train=made[family, "train"], test=made[family, "test"])
    for split in SPLITS:
        for problem in made[family, split]:
            assert problem.provenance.split == split
            wanted = "train" if split == "rl" else split
            for style in problem.styles:
                kind, _, name = style.partition(":")
                assert style_split(kind, name) == wanted, style


def test_styles_of_the_test_set_never_occur_in_training(made):
    """Over all families at once, whatever a style is used for."""
    used = {split: set[str]() for split in SPLITS}
    for (_, split), problems in made.items():
        used[split] |= {style for problem in problems for style in problem.styles}
    assert used["train"] | used["rl"]
    for held_out in ("validation", "test"):
        assert used[held_out] and used[held_out].isdisjoint(used["train"] | used["rl"])
    assert used["test"].isdisjoint(used["validation"])
    kinds = {style.partition(":")[0] for style in used["test"]}
    assert kinds == {"font", "palette", "voice"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bits(made, family: str):
    again = generate(family=family, seed=3, count=2, split="test")
    for first, second in zip(made[family, "test"], again, strict=False):
        assert first.question == second.question and first.answer == second.answer
        for name in first.media:
            for a, b in zip(first.media[name], second.media[name], strict=True):
                assert np.array_equal(a, b)  # pyright: ignore[reportArgumentType]
    other = generate(family=family, seed=4, count=COUNT, split="test")
    assert [p.signature for p in other] != [p.signature for p in made[family, "test"]]


def test_media_and_their_marks_belong_together(made):
    for problem in (problem for problems in made.values() for problem in problems):
        marks = re.findall(r"<\|(\w+)_(\d+)\|>", problem.question)
        assert marks == [
            (word_of(name), str(number))
            for name, sources in problem.media.items()
            for number in range(1, len(sources) + 1)
        ]
        for picture in problem.media.get(VISION, ()):
            assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8
            assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 1
        for samples in problem.media.get(SPEECH, ()):
            assert isinstance(samples, np.ndarray) and samples.dtype == np.float32
            assert 0.2 < len(samples) / 16_000 < 10 and 0.003 < np.abs(samples).max() <= 1
        assert problem.messages()[1].content == problem.answer


def test_counts_are_those_of_the_picture():
    """By the colours that are in it: every shape is of one, on paper of none."""
    random = np.random.default_rng(0)
    things = [
        canvas.Shape("square", "red", 0, 0),
        canvas.Shape("circle", "blue", 1, 1),
        canvas.Shape("triangle", "red", 2, 2),
    ]
    picture = canvas.shapes(things, random).picture.astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
    blue = (picture[..., 2] > 150) & (picture[..., 0] < 100)
    cells = lambda mask: mask.reshape(3, 32, 3, 32).any((1, 3)).tolist()  # noqa: E731
    assert cells(red) == [[True, False, False], [False, False, False], [False, False, True]]
    assert cells(blue) == [[False, False, False], [False, True, False], [False, False, False]]


def test_a_recut_word_keeps_its_marks_over_its_letters():
    """However it is stretched and slanted: the ink of a column of letters lies in their marks."""
    style = canvas.draw_style(np.random.default_rng(0), "test")
    assert (style.stretch, style.slant, style.weight) == (1, 0, 0)
    style = style._replace(ink=(0, 0, 0), paper=(255, 255, 255))
    forms: list[float] = []
    for stretch, slant, weight in ((1, 0, 0), (0.85, -0.05, 0.7), (1.2, 0.15, 0), (1, 0.15, 0.7)):
        changed = style._replace(stretch=stretch, slant=slant, weight=weight)
        picture, marks = canvas.words(["nom", "xu"], changed, np.random.default_rng(1))
        assert "".join(mark.name for mark in marks) == "nomxu"
        assert picture.shape[1] == canvas.SHEET
        forms.append((marks[2].right - marks[0].left) / (marks[0].bottom - marks[0].top))
        inside = np.zeros(picture.shape[:2], bool)
        for mark in marks:  # the letters are as high as their marks; a pixel for the blur
            top, bottom = round(mark.top) - 4, round(mark.bottom) + 3
            inside[max(0, top) : bottom, max(0, int(mark.left) - 2) : round(mark.right) + 3] = True
        ink = picture.mean(-1) < 128
        assert ink.sum() > 100 and ink[inside].sum() > 0.99 * ink.sum()
    assert forms[1] < forms[0] < forms[2]
    in_training = [canvas.draw_style(np.random.default_rng(k), "train") for k in range(40)]
    assert len({each.stretch for each in in_training}) > 10


@pytest.mark.parametrize("family", ["spoken_sum", "spoken_scene"])
def test_what_was_heard_is_thought_before_the_answer(made, family: str):
    for problem in made[family, "train"]:
        reply = problem.messages()[1]
        assert reply.thinking and reply.thinking.endswith("?") and reply.content == problem.answer
        assert reply.thinking not in problem.question


def test_every_scan_belongs_to_one_split_whichever_family_shows_it(
    monkeypatch: pytest.MonkeyPatch,
):
    parts = {split: {n for d in range(10) for n in scans_of(split, d)} for split in SPLITS}
    assert set.union(*parts.values()) == set(range(1797))
    assert sum(map(len, parts.values())) == 1797
    asked: list[str] = []

    def recorded(split: Split, digit: int):
        asked.append(split)
        return scans_of(split, digit)

    monkeypatch.setattr(media_generate, "scans_of", recorded)
    for split in SPLITS:
        for problem in generate(family="digit", seed=1, count=COUNT, split=split):
            assert int(problem.signature.split()[1]) in parts[split]
        asked.clear()
        generate(family="scans", seed=1, count=COUNT, split=split)
        assert asked and {*asked} == {split}


def test_a_reply_that_a_picture_shows_is_learnt_letter_by_letter(nano_tokenizer: Tokenizer):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    for problem in generate(family="text", seed=5, count=20, split="train"):
        example = renderer.example(problem.messages())
        told = spelt(example, problem, nano_tokenizer)
        as_text = [nano_tokenizer.decode(each.tokens.tolist()) for each in (example, told)]
        assert as_text[0] == as_text[1]
        learnt = told.tokens[told.loss_mask].tolist()
        assert [nano_tokenizer.decode([id_]) for id_ in learnt[:-1]] == list(problem.answer)
        assert learnt[-1] == example.tokens[example.loss_mask][-1]
        assert len(told.tokens) - len(example.tokens) == (
            told.loss_mask.sum() - example.loss_mask.sum()
        )
    for family in ("shapes", "command"):
        [problem] = generate(family=family, seed=5, count=1, split="train")
        example = renderer.example(problem.messages())
        assert spelt(example, problem, nano_tokenizer) is example


def test_voices_are_deterministic_and_differ():
    voice = Voice("m1", "en-us", 50, 160)
    first = speak("open the door", voice)
    other = speak("open the door", voice._replace(speaker="f2"))
    assert np.array_equal(speak("open the door", voice), first)
    assert len(other) != len(first) or not np.allclose(other, first)
    assert len(speak("open the door", voice._replace(words_per_minute=250))) < len(first)
    with pytest.raises(DataError, match="no voice 'en-us\\+nobody'"):
        speak("a", voice._replace(speaker="nobody"))
    with pytest.raises(DataError, match="nothing to say"):
        speak("", voice)
    for speaker in SPEAKERS:
        assert len(speak("two", voice._replace(speaker=speaker))) > 2000, speaker


def test_a_voice_breathes_the_same_at_any_time():
    """espeak-ng's own random numbers begin with the second of the day."""
    voice = Voice("f2", "en-us", 50, 160)  # one of those that breathe
    first = speak("two", voice)
    time.sleep(1.1)
    assert np.array_equal(speak("two", voice), first)


def test_every_split_has_styles_of_its_own():
    every = {"voice": SPEAKERS, "palette": canvas.PALETTES, "font": fonts.families()}
    for kind, names in every.items():
        parts = [set(styles_of(split, kind, names)) for split in ("train", "validation", "test")]
        assert set().union(*parts) == set(names) and sum(map(len, parts)) == len(set(names))
        assert styles_of("rl", kind, names) == styles_of("train", kind, names)
    with pytest.raises(DataError, match="no voice is left for the split 'test'"):
        styles_of("test", "voice", ["f2"])
    with pytest.raises(ConfigError, match="no family 'smell'"):
        generate(family="smell", seed=0, count=1, split="train")


def test_every_cut_of_every_family_draws_all_that_is_read():
    """Distinct letters and digits, whether a font is a file or inside a module."""

    def drawn(cut: Path, letter: str) -> bytes:
        pixels: Any = fonts.font(cut, 40).getmask(letter)
        return bytes(pixels)

    found = fonts.families()
    assert {"DejaVuSans", "NotoSans"} <= set(found)
    for cut in itertools.chain.from_iterable(found.values()):
        letters = [drawn(cut, letter) for letter in string.digits + string.ascii_lowercase]
        assert all(map(any, letters)) and len(set(letters)) == len(letters), cut.name


def test_buckets_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, size=103).tolist()
    batches = length_buckets(lengths, size=8, window=13, seed=1)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(103))
    assert [len(batch) for batch in batches] == [8] * 12 + [7]
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in batches])
    assert spread < 120  # of 8 random lengths it is 777 on average
    again = length_buckets(lengths, size=8, window=13, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(batches[0], length_buckets(lengths, size=8, window=13, seed=2)[0])
