"""Sources: where problems come from, as configuration.

A source yields the problems of one split. Generated and outside problems alike belong to a split by
their content, so no seed and no file can put one problem on both sides.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, field_validator

from phikit.base.config import Config
from phikit.base.errors import DataError, MissingExtraError
from phikit.data.media.generate import FAMILIES
from phikit.data.media.generate import generate as generate_media
from phikit.data.media.layouts import Layout, read_layout
from phikit.data.media.problem import MediaProblem
from phikit.data.media.rows import Columns, problem_of
from phikit.data.problem import Problem, Provenance, normalise, read_problems
from phikit.data.procedural import DEFAULT_STEPS, Level, generate
from phikit.data.split import Split, split_of


class ProceduralSource(Config):
    """Generated word problems with traces."""

    kind: Literal["procedural"] = "procedural"
    count: int
    steps: dict[int, float] = Field(default_factory=lambda: dict(DEFAULT_STEPS))
    """Number of calculations in a problem, and the weight of each."""
    families: tuple[str, ...] | None = None
    """None takes all."""
    level: Level = Level()


class FileSource(Config):
    """A JSONL file of `{"question", "answer"}` rows, with "thinking" and "solution" to train on."""

    kind: Literal["file"] = "file"
    path: str
    count: int | None = None


class HubSource(Config):
    """A data set of the Hugging Face hub, read row by row; needs the `hub` extra and a network."""

    kind: Literal["hub"] = "hub"
    id: str
    revision: str | None = None
    name: str | None = None
    rows_of: str = "train"
    """The data set's own split to read from."""
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None
    """Column with the reply: text, or turns `{"role", "content"}` of which the assistant's last one
    counts. A `<think>` part in it becomes the thinking."""
    count: int | None = None
    media: dict[str, str] = Field(default_factory=dict)
    """Column of each modality, such as `{"vision": "image"}`; rows are then problems with media."""
    prompt: str | None = None
    """What is asked of every row with media, in place of the column `question`."""
    license: str = "unknown"
    is_benchmark: bool = False
    """All rows are test problems; otherwise each belongs to a split by its content."""


class MediaSource(Config):
    """Generated problems about pictures and speech."""

    kind: Literal["media"] = "media"
    families: dict[str, NonNegativeInt]
    """How many problems of each family of `data.media.generate`."""

    @field_validator("families")
    @classmethod
    def _are_known(cls, families: dict[str, int]) -> dict[str, int]:
        if unknown := [family for family in families if family not in FAMILIES]:
            raise ValueError(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
        if not any(families.values()):
            raise ValueError("no problem of any family")
        return families

    @property
    def count(self) -> int:
        return sum(self.families.values())


class MediaFileSource(Config):
    """Pictures or recordings of one's own, in a published layout (`data.media.layouts`)."""

    kind: Literal["media_file"] = "media_file"
    layout: Layout
    path: str
    """The file that lists the items, or their folder."""
    columns: Columns | None = None
    """Of a Parquet file that others wrote."""
    count: int | None = None
    held_out: str | None = None
    """A speaker whose recordings are the held-out problems; all the others' train. None goes by
    the content."""


Source = Annotated[
    ProceduralSource | FileSource | HubSource | MediaSource | MediaFileSource,
    Field(discriminator="kind"),
]


def load_problems(
    source: Source, *, split: Split, seed: int, on_item: Callable[[], object] = lambda: None
) -> list[Problem]:
    """The source's problems of one split, at most `count`.

    `on_item` is called after each picture or sound that is made, for a progress bar.

    Raises DataError if there are none, MissingExtraError if a hub source lacks its package.
    """
    if isinstance(source, ProceduralSource):
        return generate(
            seed=seed,
            count=source.count,
            split=split,
            families=source.families,
            steps=source.steps,
            level=source.level,
        )
    if isinstance(source, MediaSource):
        return [
            problem
            for family, count in source.families.items()
            for problem in generate_media(
                family=family, seed=seed, count=count, split=split, on_item=on_item
            )
        ]
    if isinstance(source, MediaFileSource):
        return _of_files(source, split)
    is_benchmark = False
    if isinstance(source, FileSource):
        problems: Iterable[Problem] = read_problems(source.path)
    else:
        problems, is_benchmark = _hub(source), source.is_benchmark
        if is_benchmark and split != "test":
            raise DataError(
                f"{source.id} is a benchmark, asked for the split {split!r}",
                fix='evaluate on it with split="test", and train on other data',
            )
    found: list[Problem] = []
    for problem in problems:
        if source.count is not None and len(found) == source.count:
            break
        if is_benchmark or problem.provenance.split == split:
            found.append(problem)
    if not found:
        raise DataError(f"{source.kind} source has no problem of the split {split!r}")
    return found


def _of_files(source: MediaFileSource, split: Split) -> list[Problem]:
    """The problems of one side, spread evenly over the whole, as layouts are sorted."""
    found = read_layout(source.layout, Path(source.path), columns=source.columns)
    if source.held_out is None:
        chosen = [problem for problem in found if problem.provenance.split == split]
    else:
        mark = f"voice:{source.held_out}"
        is_training = split in ("train", "rl")
        chosen = [problem for problem in found if (mark in problem.styles) != is_training]
    if not chosen:
        raise DataError(
            f"{source.path} has no problem of the split {split!r}",
            fix="check held_out" if source.held_out else "give it more items",
        )
    step = 1 if source.count is None else max(1, len(chosen) // source.count)
    return list(chosen[::step][: source.count])


def _hub(source: HubSource) -> Iterable[Problem]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("datasets", "hub") from error
    try:
        rows = load_dataset(
            source.id, source.name, split=source.rows_of, revision=source.revision, streaming=True
        )
    except Exception as error:  # of the hub, the connection, the data set's own description
        raise DataError(
            f"cannot open {source.id}: {error}", fix="check its name, rows_of, and the network"
        ) from error
    if not source.media:
        for index, row in enumerate(rows):
            yield _hub_problem(source, row, index)
        return
    if getattr(rows, "features", None):
        rows = rows.decode(False)  # our own loaders know limits
    columns = Columns(
        question=None if source.prompt else source.question,
        prompt=source.prompt,
        answer=source.answer,
        media=source.media,
    )
    root = Path(source.id) if Path(source.id).is_dir() else None
    for index, row in enumerate(rows):
        yield _licensed(
            problem_of(row, columns, source=source.id, family=source.id, index=index, root=root),
            source,
        )


def _licensed(problem: MediaProblem, source: HubSource) -> MediaProblem:
    """The problem with what the source says of all of its rows."""
    changes: dict[str, Any] = {
        "license": source.license,
        "generator": "hub",
        "version": source.revision or "main",
    }
    if source.is_benchmark:
        changes["split"] = "test"
    return replace(problem, provenance=replace(problem.provenance, **changes))


def _last_reply(value: Any) -> Any:
    """The assistant's last turn, if `value` is a list of turns."""
    if isinstance(value, list):
        turns = [t for t in value if isinstance(t, dict) and t.get("role") == "assistant"]
        return turns[-1].get("content") if turns else None
    return value


def _hub_problem(source: HubSource, row: Mapping[str, Any], index: int) -> Problem:
    columns = [c for c in (source.question, source.answer, source.solution) if c is not None]
    row = {column: _last_reply(row.get(column)) for column in columns}
    missing = [column for column in columns if not isinstance(row[column], str)]
    if missing:
        raise DataError(
            f"{source.id}, row {index}: no text in the columns {missing}",
            fix="name the columns in the source's config",
        )
    thinking, solution = None, row[source.solution] if source.solution else None
    if solution is not None and "</think>" in solution:
        thinking, solution = solution.removeprefix("<think>").split("</think>", 1)
        thinking, solution = thinking.strip(), solution.strip()
    signature = normalise(row[source.question])
    return Problem(
        question=row[source.question],
        answer=row[source.answer],
        thinking=thinking,
        solution=solution,
        steps=None,
        signature=signature,
        provenance=Provenance(
            source=source.id,
            family="",
            license=source.license,
            split="test" if source.is_benchmark else split_of(signature),
            generator="hub",
            version=source.revision or "main",
            seed=0,
            index=index,
        ),
    )
