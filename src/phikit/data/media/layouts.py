"""Readers of pictures and recordings that people have, in the layouts they are published in.

Nothing is decoded here: an item is a path, read when its problem is prepared, where a damaged or
missing file is named (`problem.prepare`). A problem's split is a hash of its speaker where there is
one, else of the file's path inside its folder, or is given: to leave one speaker out, read the
recordings twice.

- LLaVA's JSON: `[{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."},
  {"from": "gpt", "value": ...}]}]`, images beside it or in a folder, one or a list of them.
- LibriSpeech: `SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`, a line `ID WORDS` for each `ID.flac`.
- Common Voice: a `.tsv` with the columns `path`, `sentence` and `client_id`, sounds in `clips/`.
- Free Spoken Digit Dataset: `{digit}_{speaker}_{take}.wav`.
- Parquet and WebDataset: whole problems in one file or several (`parquet`, `shards`).
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phikit.base.errors import DataError
from phikit.base.media import SPEECH, VISION
from phikit.data.media.generate import NUMERALS
from phikit.data.media.parquet import read_parquet
from phikit.data.media.problem import MediaProblem
from phikit.data.media.rows import PROMPTS, Columns, inside, new_problem
from phikit.data.media.shards import read_shards

Layout = Literal["llava", "librispeech", "common_voice", "spoken_digits", "parquet", "webdataset"]
MAX_TEXT_BYTES = 1 << 30
"""Of one file of transcripts or conversations."""


class Item(NamedTuple):
    """One example of a layout."""

    question: str
    answer: str
    media: Mapping[str, tuple[Path, ...]]
    speaker: str | None = None


def read_layout(
    layout: Layout, path: Path, *, columns: Columns | None = None
) -> list[MediaProblem]:
    """The problems in a file or folder of this layout, in its order; none of the media is opened.

    Args:
        columns: of a Parquet file that others wrote.

    Raises:
        DataError: the file or folder is absent, holds nothing of the layout, or is malformed.
    """
    root = path if path.is_dir() else path.parent
    if not path.exists():
        raise DataError(f"there is no {path}", fix="give the path of the data")
    family = family_of(layout)
    if layout == "parquet":
        found = list(read_parquet(path, columns))
    elif layout == "webdataset":
        found = list(read_shards(path))
    else:
        items = _READERS[layout](path)
        found = [_problem(item, index, family, root) for index, item in enumerate(items)]
    if not found:
        raise DataError(f"{path} holds nothing in the layout {layout!r}", fix="check the layout")
    return found


def family_of(layout: Layout) -> str:
    """What problems of a layout are called in results; the generator has spoken digits too."""
    return "recorded_digits" if layout == "spoken_digits" else layout


def _problem(item: Item, index: int, family: str, root: Path) -> MediaProblem:
    return new_problem(
        item.question,
        item.answer,
        item.media,
        source=root.name,
        family=family,
        index=index,
        names=[str(file.relative_to(root)) for of in item.media.values() for file in of],
        speaker=item.speaker,
    )


def _llava(path: Path) -> Iterator[Item]:
    """The first question and answer of each conversation, whose pictures come first; those about
    text alone are left out."""
    if path.is_dir():
        raise DataError(f"{path} is a folder", fix="give the .json file")
    try:
        rows = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        place = f"{path}: row {number}"
        asked, said = _turns(row, place)
        named = row.get("image") or []
        images = named if isinstance(named, list) else [named]
        if not images and "<image>" not in asked:
            continue
        if not images or not all(isinstance(image, str) for image in images):
            raise DataError(f"{place}: no picture in {named!r:.80}", fix="name its files")
        if not said.strip():
            raise DataError(f"{place}: gpt says nothing", fix="leave it out")
        yield Item(asked, said, {VISION: tuple(inside(path.parent, image) for image in images)})


def _turns(row: Any, place: str) -> tuple[str, str]:
    try:
        human, reply = row["conversations"][:2]
        asked, said = human["value"], reply["value"]
        is_text = isinstance(asked, str) and isinstance(said, str)
        if (human["from"], reply["from"]) == ("human", "gpt") and is_text:
            return asked, said
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(
        f"{place}: no conversation of a human and gpt",
        fix='write {"image": ..., "conversations": [{"from": "human", "value": ...}, ...]}',
    )


def _librispeech(path: Path) -> Iterator[Item]:
    for transcript in sorted(path.rglob("*.trans.txt")):
        for line in _text(transcript).splitlines():
            name, _, words = line.partition(" ")
            if words.strip():
                file = inside(transcript.parent, f"{name}.flac")
                speaker = name.partition("-")[0]
                yield Item(PROMPTS[SPEECH], words.strip().lower(), {SPEECH: (file,)}, speaker)


def _common_voice(path: Path) -> Iterator[Item]:
    if path.is_dir():
        raise DataError(f"{path} is a folder", fix="give one of its .tsv files, such as train.tsv")
    try:
        rows = list(
            csv.DictReader(io.StringIO(_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
        )
    except csv.Error as error:
        raise DataError(f"{path}: {error}", fix="fetch it again") from error
    for number, row in enumerate(rows, start=1):
        clip, words = row.get("path"), row.get("sentence")
        if not clip or not words:
            raise DataError(f"{path}: row {number} has no path or no sentence: {row!r:.200}")
        sound = inside(path.parent / "clips", clip)
        yield Item(PROMPTS[SPEECH], words.strip(), {SPEECH: (sound,)}, row.get("client_id"))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DataError(f"{path} is larger than {MAX_TEXT_BYTES} bytes", fix="split it")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as text: {error}", fix="save it in UTF-8"
        ) from error


def _spoken_digits(path: Path) -> Iterator[Item]:
    for file in sorted(path.glob("[0-9]_*_*.wav")):
        digit, speaker, _ = file.stem.split("_", 2)
        yield Item(PROMPTS[SPEECH], NUMERALS[int(digit)], {SPEECH: (file,)}, speaker)


_READERS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    "llava": _llava,
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "spoken_digits": _spoken_digits,
}
