"""Generated problems about pictures and speech: families, splits, seeds.

A problem's split is a hash of what it asks and shows, fonts and voices aside; the styles of a split
are its own (`style`). So neither the content nor the look of a test problem was seen in training.
Handwritten digits are real, and their split is that of the scan.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phikit.base.errors import ConfigError, MissingExtraError
from phikit.base.media import SPEECH, VISION
from phikit.data.media import canvas
from phikit.data.media.augment import SPEEDS, at_speed, with_noise
from phikit.data.media.canvas import Mark
from phikit.data.media.problem import MediaProblem, Source
from phikit.data.media.speak import draw_voice, speak
from phikit.data.problem import Provenance
from phikit.data.split import Split, split_of

VERSION = "3"
MOST_TRIES = 10_000
"""Drafts of one problem until one is of the split."""


class Draft(NamedTuple):
    """What a family has made up."""

    question: str
    answer: str
    signature: str
    """Equal for two problems that differ only in looks."""
    render: Callable[[np.random.Generator, Split], "Rendered"]
    """Called once the draft is known to be of the split."""


class Rendered(NamedTuple):
    """The media of a problem, and the styles they were made with."""

    media: Mapping[str, tuple[Source, ...]]
    styles: tuple[str, ...]
    marks: tuple[tuple[Mark, ...], ...] = ()
    """Of each picture."""


def _seen(*drawn: canvas.Drawn, styles: tuple[str, ...] = ()) -> Rendered:
    """Pictures alone."""
    pictures = tuple(each.picture for each in drawn)
    return Rendered({VISION: pictures}, styles, tuple(each.marks for each in drawn))


# fmt: off
NOUNS = (
    "apple", "bread", "cloud", "dream", "eagle", "flame", "grape", "house", "ideal", "jolly",
    "knife", "lemon", "mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger",
    "uncle", "violin", "water", "youth", "zebra", "bridge", "candle", "desert", "engine", "forest",
    "garden", "harbor", "island", "jacket", "kitten", "ladder", "market", "needle", "orange",
    "pencil", "quartz", "ribbon", "school", "temple", "valley", "window", "yellow", "copper",
)
LABELS = ("A", "B", "C", "D", "E", "F", "G", "H", "K", "M")
VERBS = ("open", "close", "start", "stop", "turn on", "turn off", "raise", "lower")
THINGS = ("the door", "the window", "the light", "the music", "the fan", "the heater", "the blinds")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# fmt: on


def _pick(random: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    places = random.choice(len(items), size=count, replace=False)
    return [items[int(place)] for place in places]


def draft_text(random: np.random.Generator) -> Draft:
    """A rendered word, one or two, or a number."""
    if random.random() < 0.3:
        text = str(random.integers(10, 100_000))
    else:
        text = " ".join(_pick(random, NOUNS, int(random.integers(1, 3))))
        text = canvas.any_of(random, (text, text.title(), text.upper()))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        style = canvas.draw_style(random, split)
        drawn = canvas.words(text, style, random, pixels=int(random.integers(28, 37)))
        return _seen(drawn, styles=style.names[:1])

    return Draft("<|image_1|>What does it say?", text, f"text {text.lower()}", render)


def draft_chart(random: np.random.Generator) -> Draft:
    """The value of a bar, or the label of the highest one."""
    labels = sorted(_pick(random, LABELS, int(random.integers(3, 5))))
    values = [int(v) for v in random.choice(np.arange(3, 60), size=len(labels), replace=False)]
    if random.random() < 0.75:
        which = int(random.integers(len(labels)))
        asked, answer = f"What is the value of {labels[which]}?", str(values[which])
    else:
        asked, answer = "Which bar is the highest?", labels[int(np.argmax(values))]

    def render(random: np.random.Generator, split: Split) -> Rendered:
        style = canvas.draw_style(random, split)
        return _seen(canvas.bars(labels, values, style, random), styles=style.names)

    signature = f"chart {list(zip(labels, values, strict=True))}"
    return Draft(f"<|image_1|>{asked}", answer, signature, render)


def draft_table(random: np.random.Generator) -> Draft:
    """A cell of a table."""
    columns = sorted(_pick(random, LABELS, int(random.integers(2, 4))))
    rows = _pick(random, NOUNS, int(random.integers(2, 4)))
    cells = [[str(v) for v in random.integers(1, 100, size=len(columns))] for _ in rows]
    r, c = int(random.integers(len(rows))), int(random.integers(len(columns)))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        style = canvas.draw_style(random, split)
        lines = [["", *columns], *([row, *of] for row, of in zip(rows, cells, strict=True))]
        return _seen(canvas.table(lines, style, random), styles=style.names[:1])

    question = f"<|image_1|>What is {columns[c]} of {rows[r]}?"
    return Draft(question, cells[r][c], f"table {columns} {rows} {cells}", render)


def draft_scene(random: np.random.Generator) -> tuple[list[canvas.Shape], str]:
    """One to four shapes in a grid of nine, and what they are, as text."""
    places = random.choice(9, size=int(random.integers(1, 5)), replace=False)
    things = [
        canvas.Shape(
            canvas.any_of(random, canvas.SHAPES),
            canvas.any_of(random, tuple(canvas.COLOURS)),
            *divmod(int(place), 3),
        )
        for place in sorted(places)
    ]
    return things, f"scene {[tuple(thing) for thing in things]}"


def about_scene(random: np.random.Generator, things: Sequence[canvas.Shape]) -> tuple[str, str]:
    """A question about a scene, and its answer."""
    kind, form = int(random.integers(4)), canvas.any_of(random, canvas.SHAPES)
    alone = [thing for thing in things if _is_alone(thing, things, of=("form", "colour")[kind % 2])]
    if kind == 0:
        return "How many shapes are there?", str(len(things))
    if kind == 1 or not alone:
        return f"How many {form}s are there?", str(sum(t.form == form for t in things))
    thing = alone[int(random.integers(len(alone)))]
    if kind == 2:
        return f"What color is the {thing.form}?", thing.colour
    return f"What shape is {thing.colour}?", thing.form


def _is_alone(thing: canvas.Shape, things: Sequence[canvas.Shape], *, of: str) -> bool:
    """Whether no other thing has its form, or its colour."""
    return sum(getattr(other, of) == getattr(thing, of) for other in things) == 1


def draft_shapes(random: np.random.Generator) -> Draft:
    """Counting, and what a form's colour or a colour's form is."""
    things, signature = draft_scene(random)
    question, answer = about_scene(random, things)

    def render(random: np.random.Generator, split: Split) -> Rendered:
        return _seen(canvas.shapes(things, random))

    return Draft(f"<|image_1|>{question}", answer, signature, render)


def draft_pages(random: np.random.Generator) -> Draft:
    """Two pictures of a word each; one of them is asked for."""
    texts = _pick(random, NOUNS, 2)
    place = int(random.integers(2))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        styles = [canvas.draw_style(random, split) for _ in texts]
        drawn = [
            canvas.words(text, style, random, pixels=int(random.integers(28, 37)))
            for text, style in zip(texts, styles, strict=True)
        ]
        return _seen(*drawn, styles=tuple(style.names[0] for style in styles))

    which = ("first", "second")[place]
    asked = f"<|image_1|><|image_2|>What does the {which} one say?"
    return Draft(asked, texts[place], f"pages {texts}", render)


def draft_digit(random: np.random.Generator) -> Draft:
    """A scanned handwritten digit, of the 1,797 in scikit-learn."""
    pictures, digits = _digits()
    number = int(random.integers(len(digits)))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        light = pictures[number].repeat(4, axis=0).repeat(4, axis=1)
        picture = canvas.noisy(np.stack([255 - light] * 3, axis=-1), random)
        whole = canvas.Mark(str(digits[number]), 0, 0, *picture.shape[1::-1])
        return _seen(canvas.Drawn(picture, (whole,)))

    question = "<|image_1|>Which digit is this?"
    return Draft(question, str(digits[number]), f"digit {number}", render)


def draft_spoken_digits(random: np.random.Generator) -> Draft:
    """One to five digits, to be written down."""
    digits = [int(d) for d in random.integers(10, size=int(random.integers(1, 6)))]
    text = " ".join(NUMERALS[d] for d in digits)
    return _dictation(text, f"spoken {text}")


def draft_command(random: np.random.Generator) -> Draft:
    """A short order to a house, to be written down."""
    text = f"{canvas.any_of(random, VERBS)} {canvas.any_of(random, THINGS)}"
    if random.random() < 0.5:
        text += f" in {canvas.any_of(random, NUMERALS[1:])} minutes"
    return _dictation(text, f"spoken {text}")


def draft_sum(random: np.random.Generator) -> Draft:
    """A spoken question, to be answered."""
    a, b = (int(n) for n in random.integers(10, size=2))
    asked = f"What is {NUMERALS[a]} plus {NUMERALS[b]}?"

    def render(random: np.random.Generator, split: Split) -> Rendered:
        return spoken(asked, random, split)

    return Draft("<|audio_1|>Answer the question.", str(a + b), f"spoken sum {a} {b}", render)


def draft_spoken_scene(random: np.random.Generator) -> Draft:
    """A question spoken about a picture."""
    things, signature = draft_scene(random)
    asked, answer = about_scene(random, things)

    def render(random: np.random.Generator, split: Split) -> Rendered:
        heard, seen = spoken(asked, random, split), _seen(canvas.shapes(things, random))
        return seen._replace(media={**seen.media, **heard.media}, styles=heard.styles)

    return Draft("<|image_1|><|audio_1|>Answer the question.", answer, signature, render)


def spoken(text: str, random: np.random.Generator, split: Split) -> Rendered:
    """The text in a voice of the split, at some pace and under some noise."""
    voice = draw_voice(random, split)
    samples = at_speed(speak(text, voice), canvas.any_of(random, SPEEDS))
    noisy = with_noise(samples, snr_db=random.uniform(10, 40), random=random)
    return Rendered({SPEECH: (noisy,)}, voice.names)


def _dictation(text: str, signature: str) -> Draft:
    def render(random: np.random.Generator, split: Split) -> Rendered:
        return spoken(text, random, split)

    return Draft("<|audio_1|>Write down what is said.", text, signature, render)


FAMILIES: Mapping[str, Callable[[np.random.Generator], Draft]] = {
    "text": draft_text,
    "chart": draft_chart,
    "table": draft_table,
    "shapes": draft_shapes,
    "digit": draft_digit,
    "spoken_digits": draft_spoken_digits,
    "command": draft_command,
    "spoken_sum": draft_sum,
    "spoken_scene": draft_spoken_scene,
    "pages": draft_pages,
}


def generate(
    *,
    family: str,
    seed: int,
    count: int,
    split: Split,
    on_item: Callable[[], object] = lambda: None,
) -> list[MediaProblem]:
    """`count` problems of one family and split; the same arguments give the same bits.

    `on_item` is called after each, for a progress bar: speech takes ten milliseconds.

    Raises:
        ConfigError: there is no such family.
        DataError: no font or voice is left for the split.
        MissingExtraError: the extra `synth` is not installed.
    """
    made: list[MediaProblem] = []
    for index in range(count):
        made.append(_problem(family, seed, index, split))
        on_item()
    return made


def drafts(*, family: str, seed: int, count: int, split: Split) -> list[Draft]:
    """What `generate` would ask and answer, without a picture or a sound being made."""
    streams = (_stream(family, seed, index) for index in range(count))
    return [_draft(family, random, split) for random in streams]


def _stream(family: str, seed: int, index: int) -> np.random.Generator:
    if family not in FAMILIES:
        raise ConfigError(f"no family {family!r}", fix=f"choose from: {', '.join(FAMILIES)}")
    return np.random.default_rng([seed, list(FAMILIES).index(family), index])


def _draft(family: str, random: np.random.Generator, split: Split) -> Draft:
    tries = (FAMILIES[family](random) for _ in range(MOST_TRIES))
    return next(draft for draft in tries if split_of(draft.signature) == split)


def _problem(family: str, seed: int, index: int, split: Split) -> MediaProblem:
    random = _stream(family, seed, index)
    draft = _draft(family, random, split)
    rendered = draft.render(random, split)
    return MediaProblem(
        question=draft.question,
        answer=draft.answer,
        thinking=None,
        solution=draft.answer,
        steps=None,
        signature=draft.signature,
        provenance=Provenance(
            source=family,
            family=family,
            license="CC0-1.0" if family != "digit" else "BSD-3-Clause",
            split=split,
            generator="phikit.data.media",
            version=VERSION,
            seed=seed,
            index=index,
        ),
        media=rendered.media,
        styles=rendered.styles,
        marks=rendered.marks,
    )


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures [N, 8, 8], white on black, and what they show.

    Read from scikit-learn's own file: importing scikit-learn takes seconds.
    """
    spec = find_spec("sklearn")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(place) / "datasets" / "data" / "digits.csv.gz" for place in places]
    if not files:
        raise MissingExtraError("scikit-learn", "synth")
    table = np.loadtxt(files[0], delimiter=",")
    pictures = (table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pictures, table[:, 64].astype(np.uint8)
