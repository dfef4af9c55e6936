"""Problems with media in Parquet: a row a problem, a column a modality, items as `{bytes, path}`.

That is how data sets of the Hugging Face hub store pictures and sounds, so their files are read
too, once the columns are named. Items stay in memory as they are stored, compressed; for data
larger than that there are shards (`shards`).
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from phikit.base.errors import DataError, MissingExtraError
from phikit.base.files import replacing
from phikit.data.media.encode import file_bytes, suffix_of
from phikit.data.media.problem import MediaProblem
from phikit.data.media.rows import Columns, from_record, problem_of, record_of, stored_items

MARK = b"phikit.media"
"""In the metadata of our own files: the columns that hold media, as JSON."""
_NAMES = TypeAdapter(list[str])
WRITTEN_ROWS, READ_ROWS = 64, 8
"""Rows of a row group that is written, and rows that are decoded at once."""
MAX_GROUP_BYTES = 4 << 30
"""Of a row group, uncompressed; a larger one is refused before it is read."""
MAX_BYTES = 16 << 30
"""Of all rows of a file once they are decoded: one value that many rows share is stored once."""


def write_parquet(problems: Sequence[MediaProblem], path: Path) -> None:
    """Write problems with their media to one file.

    Raises:
        DataError: an item cannot be read; names it.
        StorageError: the disk is full or the folder may not be written.
        MissingExtraError: pyarrow is not installed.
    """
    pa, pq = _arrow()
    modalities = list(dict.fromkeys(name for problem in problems for name in problem.media))
    schema = _schema(pa, modalities)
    rows = (_row(problem, modalities) for problem in problems)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while batch := list(islice(rows, WRITTEN_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def read_parquet(path: Path, columns: Columns | None = None) -> Iterator[MediaProblem]:
    """The problems in a file, or in those of a folder by name; no medium is opened.

    Args:
        columns: of a file that others wrote; None for one of `write_parquet`.

    Raises:
        DataError: a file is damaged, a row group too large, or a column absent.
        MissingExtraError: pyarrow is not installed.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        modalities, rows = _rows(file, columns)
        if columns is None and modalities is None:
            raise DataError(
                f"{file} does not say which columns hold media",
                fix='name them: columns.media={"vision": "image"}',
            )
        for index, row in enumerate(rows):
            place = f"{file.name}, row {index}"
            if columns is not None:
                yield problem_of(
                    row, columns, source=file.name, family="parquet", index=index, root=file.parent
                )
                continue
            cells = {name: row.get(name) or [] for name in modalities or ()}
            if wrong := [name for name, cell in cells.items() if not isinstance(cell, list)]:
                raise DataError(
                    f"{place}: no list in the column {wrong[0]!r}", fix="write it again"
                )
            media = {
                name: stored_items(cell, f"{place}, {name}", modality=name, root=None)
                for name, cell in cells.items()
            }
            yield from_record(row, {k: of for k, of in media.items() if of}, place=place)


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    return pyarrow, pyarrow.parquet


def _schema(pa: Any, modalities: Sequence[str]) -> Any:
    text, number = pa.string(), pa.int64()
    texts = ("source", "family", "license", "split", "generator", "version")
    provenance = pa.struct([*((name, text) for name in texts), ("seed", number), ("index", number)])
    item = pa.struct([("bytes", pa.large_binary()), ("path", text)])
    return pa.schema(
        [
            *((name, text) for name in ("question", "answer", "thinking", "solution")),
            ("steps", number),
            ("signature", text),
            ("provenance", provenance),
            ("styles", pa.list_(text)),
            *((name, pa.list_(item)) for name in modalities),
        ],
        metadata={MARK: json.dumps(modalities)},
    )


def _row(problem: MediaProblem, modalities: Sequence[str]) -> dict[str, Any]:
    row = record_of(problem)
    where = f"{problem.provenance.source}, item {problem.provenance.index}"
    for name in modalities:
        items = [file_bytes(source, where=where) for source in problem.media.get(name, ())]
        row[name] = [
            {"bytes": data, "path": f"{k}.{suffix_of(data)}"} for k, data in enumerate(items)
        ]
    return row


def _rows(file: Path, columns: Columns | None) -> tuple[list[str] | None, Iterator[dict[str, Any]]]:
    """Which columns hold media, if the file says so, and its rows, read batch by batch; of a file
    that has all `columns`, these alone."""
    pa, pq = _arrow()

    def damaged(error: Exception) -> DataError:
        return DataError(f"{file} is no Parquet file, or damaged: {error}", fix="write it again")

    try:
        table = pq.ParquetFile(file)
        marked = (table.schema_arrow.metadata or {}).get(MARK)
        modalities = None if marked is None else _NAMES.validate_json(marked)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error) from error
    for group in range(table.metadata.num_row_groups):
        if (size := table.metadata.row_group(group).total_byte_size) > MAX_GROUP_BYTES:
            raise DataError(
                f"{file}: row group {group} has {size} bytes; at most {MAX_GROUP_BYTES} are read",
                fix="write it with smaller row groups",
            )

    wanted = None
    if columns is not None:
        named = {columns.answer, *columns.media.values(), columns.question or columns.answer}
        wanted = sorted(named) if named.issubset(table.schema_arrow.names) else None

    def rows() -> Iterator[dict[str, Any]]:
        total = 0
        try:
            for batch in table.iter_batches(batch_size=READ_ROWS, columns=wanted):
                total += batch.nbytes
                if total > MAX_BYTES:
                    raise DataError(
                        f"{file} has more than {MAX_BYTES} bytes decoded", fix="write shards"
                    )
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(error) from error

    return modalities, rows()
