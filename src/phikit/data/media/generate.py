"""Generated problems about pictures and speech: families, splits, seeds.

A problem's split is a hash of what it asks and shows, fonts and voices aside; the styles of a split
are its own (`style`). So neither the content nor the look of a test problem was seen in training
with problems of its family. Families share words: one that is read alone in a test may stand in a
line of training, in another font. Handwritten digits are real, and their split is that of the scan.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phikit.base.errors import ConfigError, MissingExtraError
from phikit.base.media import SPEECH, VISION
from phikit.base.packages import package_folder
from phikit.data.media import canvas
from phikit.data.media.augment import SPEEDS, at_speed, with_noise
from phikit.data.media.canvas import Mark, any_of
from phikit.data.media.problem import MediaProblem, Source
from phikit.data.media.speak import draw_voice, speak
from phikit.data.media.style import is_altered
from phikit.data.problem import Provenance
from phikit.data.split import Split, split_of

VERSION = "5"
SCAN = 24
"""Side of a scanned digit in pixels: as large as letters are."""
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
    thinking: str | None = None
    """What to think before the answer."""


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
WORDS = """
    able acid aged also area army away baby back ball band bank base bath bear beat been bell
    best bird blow blue boat body bone book born both bowl bread bring brown bush cake calm came
    camp card care case cash cat chair check child city clean clear clock close cloud club coal
    coat code cold come cook cool copy corn cost cow crew crop cup dark data date dawn day deal
    dear deep desk dial diet dish dog door down draw dream dress drink drive drop dry dust duty
    each eagle ear early earth east easy egg eight empty end enemy even ever exit eye face fact
    fair fall farm fast fate fear feed feel fence few field file fill film find fine fire firm
    fish five flag flame flat floor flow fly food foot force form four free frog fruit full fund
    game gate gift girl give glad glass goal gold good grape grass great green grow guest guide
    hair half hall hand happy hard hat have head hear heart heat heavy help here hero high hill
    hold hole home hope horse hour house huge human ice idea inch iron item jazz join joke judge
    juice jump just keep key kind king kite knee knife know lake lamp land large last late laugh
    law lead leaf learn left lemon level lie life lift light lime line lion list live loaf local
    long look lost loud love low luck lunch made mail main make mango many map mark meal mean
    meat meet milk mind mine minor mix month moon moral more most motor mouse mouth move much
    music nail name near neck need nest never new news next nice night nine noise north nose
    note novel nurse oak ocean oil old olive once one only open oral order oven over own page
    paint pair paper park part path peace pen phone photo piano pick pilot pipe plan plate play
    poem point pond pool poor pork post power press price pride proof pull pure put queen quick
    quiet quite race radio rain raise range rate read ready real red rent rest rice rich ride
    right ring rise river road rock role roof room root rope rose round rule run sad safe said
    sail salt same sand save scale sea seat seed sell send seven shade shape share sharp she
    ship shirt shoe shop shore shot show side sign silk sing sit six size skin sky sleep slow
    small smile smoke snow soap sock soft soil some son song soon sort soul sound soup south
    space spare speak spoon sport spot staff stage stair star start stay steel step stick still
    stock stone stop store storm story sugar suit sun sure swim table tail take talk tall tank
    task taste tax tea teach team tell ten tent test text than that thick thin think third this
    tiger time tiny today tone tool tooth top total touch tour tower town track trade train tree
    trip true trust truth try tube turn twice two type uncle under unit until upper urban use
    usual value van vast verb very view visit voice vote wage wait wake walk wall want warm wash
    water wave way weak wear week well west wet wheel when where white wide wife wild wind wine
    wing wise wish woman wood wool word work world wrist write wrong yard year yes young your
    youth zebra zero zone
""".split()  # noqa: SIM905
"""Short ones."""
LABELS = ("A", "B", "C", "D", "E", "F", "G", "H", "K", "M")
VERBS = ("open", "close", "start", "stop", "turn on", "turn off", "raise", "lower")
THINGS = ("the door", "the window", "the light", "the music", "the fan", "the heater", "the blinds")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# fmt: on


def _pick(random: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    places = random.choice(len(items), size=count, replace=False)
    return [items[int(place)] for place in places]


def draft_text(random: np.random.Generator) -> Draft:
    """A short word, with or without a capital, or a number."""
    text = _word(random)
    return _about_words([text], "What does it say?", text, f"text {text.lower()}")


def _word(random: np.random.Generator) -> str:
    if random.random() < 0.3:
        return str(random.integers(100, 100_000))
    word = any_of(random, WORDS)
    return any_of(random, (word, word.title()))


def draft_lines(random: np.random.Generator) -> Draft:
    """Words and numbers below each other; one of them is asked for."""
    texts = [_word(random) for _ in range(int(random.integers(2, 4)))]
    which = int(random.integers(len(texts)))
    signature = f"lines {[text.lower() for text in texts]}"
    return _about_words(texts, f"What does line {which + 1} say?", texts[which], signature)


def _about_words(texts: Sequence[str], asked: str, answer: str, signature: str) -> Draft:
    def render(random: np.random.Generator, split: Split) -> Rendered:
        style = canvas.draw_style(random, split)
        return _seen(canvas.words(texts, style, random), styles=style.names[:1])

    return Draft(f"<|image_1|>{asked}", answer, signature, render)


def draft_chart(random: np.random.Generator) -> Draft:
    """The value of a bar."""
    bars = _bars(random)
    label, value = any_of(random, list(bars.items()))
    return _about_bars(bars, f"What is the value of {label}?", str(value))


def draft_highest(random: np.random.Generator) -> Draft:
    """The label of the highest bar."""
    bars = _bars(random)
    return _about_bars(bars, "Which bar is the highest?", max(bars, key=bars.__getitem__))


def _bars(random: np.random.Generator) -> dict[str, int]:
    labels = sorted(_pick(random, LABELS, int(random.integers(2, 4))))
    values = random.choice(np.arange(3, 60), size=len(labels), replace=False).tolist()
    return dict(zip(labels, values, strict=True))


def _about_bars(bars: dict[str, int], asked: str, answer: str) -> Draft:
    def render(random: np.random.Generator, split: Split) -> Rendered:
        style = canvas.draw_style(random, split)
        return _seen(canvas.bars([*bars], [*bars.values()], style, random), styles=style.names)

    return Draft(f"<|image_1|>{asked}", answer, f"chart {[*bars.items()]}", render)


def draft_table(random: np.random.Generator) -> Draft:
    """A cell of a table."""
    columns = sorted(_pick(random, LABELS, int(random.integers(2, 4))))
    rows = _pick(random, WORDS, int(random.integers(2, 4)))
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
            any_of(random, canvas.SHAPES),
            any_of(random, tuple(canvas.COLOURS)),
            *divmod(int(place), 3),
        )
        for place in sorted(places)
    ]
    return things, f"scene {[tuple(thing) for thing in things]}"


def about_scene(random: np.random.Generator, things: Sequence[canvas.Shape]) -> tuple[str, str]:
    """A question about a scene, and its answer."""
    kind, form = int(random.integers(3)), any_of(random, canvas.SHAPES)
    alone = [thing for thing in things if _is_alone(thing, things, of=("form", "colour")[kind % 2])]
    if kind == 2 or not alone:
        return f"How many {form}s are there?", str(sum(t.form == form for t in things))
    thing = alone[int(random.integers(len(alone)))]
    if kind == 0:
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
    texts = _pick(random, WORDS, 2)
    place = int(random.integers(2))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        styles = [canvas.draw_style(random, split) for _ in texts]
        drawn = [
            canvas.words([text], style, random) for text, style in zip(texts, styles, strict=True)
        ]
        return _seen(*drawn, styles=tuple(style.names[0] for style in styles))

    which = ("first", "second")[place]
    asked = f"<|image_1|><|image_2|>What does the {which} one say?"
    return Draft(asked, texts[place], f"pages {texts}", render)


def draft_digit(random: np.random.Generator) -> Draft:
    """A scanned handwritten digit, of the 1,797 in scikit-learn, on a sheet of paper."""
    scans, digits = _digits()
    number = int(random.integers(len(digits)))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        left, top = (int(place) for place in random.integers(1 + canvas.SHEET - SCAN, size=2))
        name = str(digits[number])
        scan = _as_written(scans[number], random, split)
        return _seen(canvas.pasted([(scan, name, left, top)], random))

    question = "<|image_1|>Which digit is this?"
    return Draft(question, str(digits[number]), _signature_of_scan(number), render)


def draft_scans(random: np.random.Generator) -> Draft:
    """Four, nine or sixteen such digits in rows; one row is asked for."""
    side = int(random.integers(2, 5))
    rows = ["".join(map(str, random.integers(10, size=side))) for _ in range(side)]
    which = int(random.integers(side))

    def render(random: np.random.Generator, split: Split) -> Rendered:
        scans, _ = _digits()
        left, top = (int(k) for k in random.integers(1 + canvas.SHEET - side * SCAN, size=2))
        glued: list[tuple[canvas.Picture, str, int, int]] = []
        for place, name in enumerate("".join(rows)):
            row, column = divmod(place, side)
            scan = scans[any_of(random, scans_of(split, int(name)))]
            scan = _as_written(scan, random, split)
            glued.append((scan, name, left + column * SCAN, top + row * SCAN))
        return _seen(canvas.pasted(glued, random))

    question = f"<|image_1|>Which digits are in row {which + 1}?"
    return Draft(question, rows[which], f"scans {rows}", render)


def draft_spoken_digits(random: np.random.Generator) -> Draft:
    """One to five digits, to be written down."""
    digits = [int(d) for d in random.integers(10, size=int(random.integers(1, 6)))]
    text = " ".join(NUMERALS[d] for d in digits)
    return _dictation(text, f"spoken {text}")


def draft_command(random: np.random.Generator) -> Draft:
    """A short order to a house, to be written down."""
    text = f"{any_of(random, VERBS)} {any_of(random, THINGS)}"
    if random.random() < 0.5:
        text += f" in {any_of(random, NUMERALS[1:])} minutes"
    return _dictation(text, f"spoken {text}")


def draft_spoken_question(random: np.random.Generator) -> Draft:
    """One or two questions about shapes or sums, to be written down."""
    asked = [_question(random) for _ in range(int(random.integers(1, 3)))]
    return _dictation(" ".join(asked), f"spoken {asked}")


def _question(random: np.random.Generator) -> str:
    if random.random() < 0.5:
        return _sum(random)[0]
    return about_scene(random, draft_scene(random)[0])[0]


def _sum(random: np.random.Generator) -> tuple[str, int, int]:
    """A question, and the numbers to be added."""
    a, b = (int(n) for n in random.integers(10, size=2))
    return f"What is {NUMERALS[a]} plus {NUMERALS[b]}?", a, b


def draft_sum(random: np.random.Generator) -> Draft:
    """A spoken question, to be answered; to think of what was heard makes it a written one."""
    asked, a, b = _sum(random)

    def render(random: np.random.Generator, split: Split) -> Rendered:
        return spoken(asked, random, split)

    question = "<|audio_1|>Answer the question."
    return Draft(question, str(a + b), f"spoken sum {a} {b}", render, thinking=asked)


def draft_spoken_scene(random: np.random.Generator) -> Draft:
    """A question spoken about a picture; what was heard is thought first."""
    things, signature = draft_scene(random)
    asked, answer = about_scene(random, things)

    def render(random: np.random.Generator, split: Split) -> Rendered:
        heard, seen = spoken(asked, random, split), _seen(canvas.shapes(things, random))
        return seen._replace(media={**seen.media, **heard.media}, styles=heard.styles)

    question = "<|image_1|><|audio_1|>Answer the question."
    return Draft(question, answer, signature, render, thinking=asked)


def spoken(text: str, random: np.random.Generator, split: Split) -> Rendered:
    """The text in a voice of the split, at some pace and under some noise."""
    voice = draw_voice(random, split)
    samples = at_speed(speak(text, voice), any_of(random, SPEEDS))
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
    "lines": draft_lines,
    "scans": draft_scans,
    "highest": draft_highest,
    "spoken_question": draft_spoken_question,
}


def generate(
    *,
    family: str,
    seed: int,
    count: int,
    split: Split,
    on_item: Callable[[], object] = lambda: None,
) -> list[MediaProblem]:
    """`count` problems of one family and split.

    The same arguments give the same bits where the same packages of fonts and voices are installed.
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
        thinking=draft.thinking,
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
    """Pictures [N, SCAN, SCAN], black on white, and what they show.

    Read from scikit-learn's own file: importing scikit-learn takes seconds.
    """
    package = package_folder("sklearn")
    if package is None:
        raise MissingExtraError("scikit-learn", "synth")
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    ink = (table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    pictures = (255 - ink).repeat(SCAN // 8, axis=1).repeat(SCAN // 8, axis=2)
    return pictures, table[:, 64].astype(np.uint8)


def _as_written(scan: canvas.Picture, random: np.random.Generator, split: Split) -> canvas.Picture:
    """A scan as it is, or in training as another hand might have written it."""
    return canvas.rewritten(scan, random) if is_altered(random, split) else scan


@cache
def scans_of(split: Split, digit: int) -> tuple[int, ...]:
    """The numbers of the scans of a digit that belong to the split, as for `draft_digit`."""
    _, digits = _digits()
    return tuple(
        number
        for number in np.flatnonzero(digits == digit).tolist()
        if split_of(_signature_of_scan(number)) == split
    )


def _signature_of_scan(number: int) -> str:
    return f"digit {number}"
