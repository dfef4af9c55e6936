"""Rows of a table as problems with media: what data sets hold in a cell, and how it is named.

A cell is kept as it came and looked into when its problem is prepared, so one that cannot be read
is a fault of its row and not of the table. Data sets of the Hugging Face hub write a picture or a
sound as `{"bytes", "path"}`; decoded, a picture is Pillow's and a sound is `{"array",
"sampling_rate"}`. All of these are understood.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from phikit.base.config import Config
from phikit.base.errors import DataError
from phikit.base.media import SPEECH, VISION, word_of
from phikit.chat.image import open_image
from phikit.data.media.encode import MAX_ITEM_BYTES, wav
from phikit.data.media.problem import MediaProblem, Source, Stored
from phikit.data.problem import Problem, Provenance, normalise
from phikit.data.split import split_of

PROMPTS = {SPEECH: "Write down what is said.", VISION: "Describe the picture."}
"""What is asked of media that come with a text and no question."""
REMOTE = re.compile(r"(zip://(?:(?!::).)+::)?hf://(?:(?!::).)+")
"""Where files of the hub's data sets are, on it or in an archive on it; no other address is
followed, and none in a chain with it."""
_RECORD = TypeAdapter(Problem)


class Columns(Config):
    """Which columns of a table are read."""

    question: str | None = None
    """None asks `prompt` of every row."""
    prompt: str | None = None
    """None asks to write down what is said, or to describe the picture."""
    answer: str = "answer"
    media: dict[str, str] = Field(min_length=1)
    """Column of each modality; a cell holds one item, several, or none. A row without any is like
    one whose item cannot be read."""


def problem_of(
    row: Mapping[str, Any],
    columns: Columns,
    *,
    source: str,
    family: str,
    index: int,
    root: Path | None = None,
) -> MediaProblem:
    """One row as a problem; no medium is opened.

    Args:
        source: what the table is called in messages.
        root: the folder that paths in cells lead into; None follows none.

    Raises:
        DataError: a column is absent, or has no text where it should.
    """
    place = f"{source}, row {index}"
    wanted = [columns.answer, *([columns.question] if columns.question else [])]
    if absent := [name for name in (*wanted, *columns.media.values()) if name not in row]:
        raise DataError(
            f"{place}: there is no column {absent[0]!r}", fix=f"there are {', '.join(row)}"
        )
    if mute := [name for name in wanted if not isinstance(row[name], str) or not row[name].strip()]:
        raise DataError(f"{place}: no text in the column {mute[0]!r}", fix="name another column")
    cells = {name: _items(row[column]) for name, column in columns.media.items()}
    if not any(cells.values()):
        cells |= {next(iter(cells)): [None]}
    media = {
        name: stored_items(of_row, f"{place}, {columns.media[name]}", modality=name, root=root)
        for name, of_row in cells.items()
        if of_row
    }
    if columns.question is not None:
        asked = row[columns.question]
    else:
        asked = columns.prompt or PROMPTS[VISION if VISION in media else SPEECH]
    names = [_known_by(cell) or str(index) for of_row in cells.values() for cell in of_row]
    return new_problem(
        asked, row[columns.answer], media, source=source, family=family, index=index, names=names
    )


def new_problem(
    question: str,
    answer: str,
    media: Mapping[str, tuple[Source, ...]],
    *,
    source: str,
    family: str,
    index: int,
    names: Sequence[str],
    speaker: str | None = None,
) -> MediaProblem:
    """A problem of outside data; a question without placeholders gets them in front.

    All questions about an item, and all that one speaker says, are in one split: that of the
    speaker, or else of the first item.

    Args:
        names: of its media, by which the same one is recognised.
        speaker: whose voice it is, if that is known.

    Raises DataError for text with half of a surrogate pair, which no tokenizer takes.
    """
    question, answer = question.replace("<image>", "").strip(), answer.strip()
    marks = [f"<|{word_of(m)}_{k}|>" for m, of in media.items() for k in range(1, len(of) + 1)]
    if not any(mark in question for mark in marks):
        question = "".join(marks) + question
    signature = " ".join([family, *names, normalise(question), normalise(answer)])
    try:
        signature.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}, item {index}: {error}", fix="write it as UTF-8") from error
    styles = () if speaker is None else (f"voice:{speaker}",)
    provenance = Provenance(
        source=source,
        family=family,
        license="unknown",
        split=split_of(next(iter((*styles, *names)), signature)),
        generator=__name__,
        version="1",
        seed=0,
        index=index,
    )
    return MediaProblem(
        question, answer, None, answer, None, signature, provenance, media=media, styles=styles
    )


def record_of(problem: MediaProblem) -> dict[str, Any]:
    """All of a problem but its media and their marks, as plain data."""
    whole = {f.name: getattr(problem, f.name) for f in fields(Problem)}
    return whole | {"provenance": asdict(problem.provenance), "styles": [*problem.styles]}


def from_record(
    record: Mapping[str, Any], media: Mapping[str, tuple[Source, ...]], *, place: str
) -> MediaProblem:
    """The inverse of `record_of`. Raises DataError for a record that is no problem's."""
    try:
        own = _RECORD.validate_python({f.name: record.get(f.name) for f in fields(Problem)})
        styles = TypeAdapter(tuple[str, ...]).validate_python(record.get("styles") or ())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{place}: {where}: {first['msg']}", fix="write the data again") from error
    values = {f.name: getattr(own, f.name) for f in fields(Problem)}
    return MediaProblem(**values, media=media, styles=styles)


def stored_items(
    items: Sequence[Any], name: str, *, modality: str, root: Path | None
) -> tuple[Stored, ...]:
    """What a cell holds, under a name and where there are several a number, looked into when it is
    loaded."""
    return tuple(
        Stored(
            f"{name} {number}" if len(items) > 1 else name,
            partial(_load, item, modality=modality, root=root),
        )
        for number, item in enumerate(items, start=1)
    )


def inside(root: Path, name: str) -> Path:
    """A file of the data set; DataError for a path that leads out of its folder."""
    try:
        is_inside = (root / name).resolve().is_relative_to(root.resolve())
    except (RuntimeError, ValueError) as error:  # links in a circle, a NUL
        raise DataError(f"{name!r} is no path: {error}") from error
    if not is_inside:
        raise DataError(f"{name!r} leads out of {root}", fix="name files inside the folder")
    return root / name


def _items(cell: Any) -> list[Any]:
    if cell is None:
        return []
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _known_by(cell: Any) -> str | None:
    """A short name by which the same file is recognised, if there is one."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes):
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    path = cell.get("path") if isinstance(cell, Mapping) else None
    return path if isinstance(path, str) else None


def _load(cell: Any, *, modality: str, root: Path | None) -> NDArray[Any] | Path | bytes:
    """What a modality can prepare, of a cell. Raises DataError for what is no medium."""
    if cell is None:
        raise DataError("the cell is empty", fix="leave such rows out")
    if isinstance(cell, bytes | np.ndarray):
        return cell
    if isinstance(cell, Mapping):
        if "array" in cell:
            return _sound(cell)
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, bytes):
            return data
        if isinstance(path, str) and REMOTE.fullmatch(path):
            return _fetched(path)
        if isinstance(path, str) and root is not None:
            return inside(root, path)
        raise DataError("the cell has neither bytes nor a file", fix="store the bytes")
    if modality == VISION and hasattr(cell, "getbands"):
        return np.asarray(open_image(cell))
    raise DataError(
        f"the cell is {type(cell).__name__}, which is no medium", fix="name another column"
    )


def _sound(cell: Mapping[str, Any]) -> bytes:
    """Samples [S] or [channels, S], kept at their rate: the audio loader resamples."""
    rate_hz = cell.get("sampling_rate")
    if not isinstance(rate_hz, int) or not 0 < rate_hz < 1 << 30:
        raise DataError(f"the sampling rate is {rate_hz!r}", fix="store samples with their rate")
    try:
        samples = np.asarray(cell["array"], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"the samples are no numbers: {error}") from error
    if samples.ndim not in (1, 2):
        raise DataError(f"samples of shape {samples.shape}", fix="give [S] or [channels, S]")
    return wav(samples if samples.ndim == 1 else samples.mean(axis=0), rate_hz=rate_hz)


def _fetched(path: str) -> bytes:
    """A file of the hub, as the library that lists it addresses it."""
    import fsspec  # pyright: ignore[reportMissingImports]

    try:
        opened: Any = fsspec.open(path, "rb")
        with opened as file:
            data = file.read(MAX_ITEM_BYTES + 1)
    except Exception as error:  # the hub's library, and that of its connections, have their own
        raise DataError(f"cannot fetch {path}: {error}", fix="check the network") from error
    if len(data) > MAX_ITEM_BYTES:
        raise DataError(f"{path} is larger than {MAX_ITEM_BYTES} bytes")
    return data
