"""Rows of text fields from a JSONL file that somebody wrote: bounded, and every fault has a place.

What is unusual: a key that looks like a misspelling of one that is absent is an error and no extra.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from phikit.base.errors import DataError

MAX_LINE_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"


def read_rows(
    path: Path,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    may_be_empty: Collection[str] = (),
) -> Iterator[tuple[int, dict[str, str]]]:
    """The fields of each row, stripped, with the number of its line; blank lines are skipped.

    Optional fields that are absent or null are left out, other keys are ignored.

    Raises:
        DataError: names file, line and reason: unreadable file, bytes that are not UTF-8, a line
            over 1 MiB, malformed JSON, a missing or empty field.
    """
    known = (*required, *optional)
    for number, line in _lines(path):
        place = f"{path}:{number}"
        row = _parse_row(line, place, known)
        fields = {}
        for key in known:
            if key in required or row.get(key) is not None:
                fields[key] = _text(row, key, place, may_be_empty=key in may_be_empty)
        yield number, fields


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines with their numbers, each bounded before it is held in memory whole."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes",
                        fix="is this JSONL? one row must stand on one line",
                    )
                if number == 1:
                    raw = raw.removeprefix(UTF8_BOM)
                line = _decode(raw, f"{path}:{number}")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}", fix="check the path") from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 at byte {error.start} of the line ({error.reason})",
            fix="convert the file to UTF-8, for example with iconv -t UTF-8",
        ) from error


def _parse_row(line: str, place: str, known: Sequence[str]) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: not JSON: {error}", fix="write one JSON object on each line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected a JSON object, found {type(row).__name__}",
            fix=f"write an object with the keys {', '.join(known)}",
        )
    for key in row.keys() - set(known):
        absent = [name for name in known if name not in row]
        if near := get_close_matches(key, absent, n=1, cutoff=0.8):
            raise DataError(f"{place}: unknown key {key!r}", fix=f"did you mean {near[0]!r}?")
    return row


def _text(row: Mapping[str, Any], key: str, place: str, *, may_be_empty: bool) -> str:
    """The field as stripped text; numbers are accepted, since answers are often written bare."""
    value = row.get(key)
    if value is None:
        found = ", ".join(sorted(row)) or "none"
        raise DataError(f"{place}: no {key!r} (keys found: {found})", fix=f"add {key!r} to the row")
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {key!r} is {type(value).__name__}, not text", fix="write it as a string"
        )
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(
            f"{place}: {key!r} holds half of a surrogate pair, which is no character",
            fix="repair the \\u escapes of this row",
        )
    if not value.strip() and not may_be_empty:
        raise DataError(f"{place}: {key!r} is empty", fix="fill it in or delete the row")
    return value.strip()
