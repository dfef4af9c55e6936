"""A problem with a checkable answer, where it came from, and how one is read from a file.

`Problem` is the one record that generation, distillation, reinforcement learning and evaluation
exchange. Its signature says what is asked without saying how: for generated problems the
structure and the numbers, for outside data the normalised question. Equality of signatures is
what "the same problem" means when splits are kept apart.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data.split import Split, content_hash, split_of

MAX_LINE_BYTES = 1 << 20
REQUIRED_KEYS = ("question", "answer")
OPTIONAL_KEYS = ("thinking", "solution")
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a record came from, in values that fit JSON; `index` counts within (source, seed)."""

    source: str
    family: str
    license: str
    split: str
    generator: str
    version: str
    seed: int
    index: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its answer, and where known the working that leads there.

    `thinking` is the reasoning trace, `solution` the visible reply, `steps` the number of
    equations in the trace; all three are None for data that has only questions and answers.
    """

    question: str
    answer: str
    thinking: str | None
    solution: str | None
    steps: int | None
    signature: str
    provenance: Provenance

    @property
    def content_hash(self) -> str:
        """Hex hash of the signature: equal for two problems that differ only in wording."""
        return content_hash(self.signature)

    def messages(self) -> list[Message]:
        """The problem as a finished conversation; DataError when it has no solution to show."""
        if self.solution is None:
            raise DataError(
                f"the problem {self.question[:60]!r} has no solution to train on",
                fix="give the rows a 'solution', or use the problems for evaluation only",
            )
        reply = Message(role="assistant", content=self.solution, thinking=self.thinking)
        return [Message(role="user", content=self.question), reply]


def normalise(text: str) -> str:
    """The text as compared between data sets: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_problems(
    path: str | Path, *, license: str = "unknown", split: Split | None = None
) -> list[Problem]:
    """Reads problems from a JSONL file of `{"question": ..., "answer": ...}` rows.

    Optional keys are "thinking" and "solution"; other keys are ignored unless they look like a
    misspelling of one of these. `split` labels every row; by default each row's split follows
    from its content. Raises DataError naming file, line and reason: unreadable file, bytes that
    are not UTF-8, a line over 1 MiB, malformed JSON, a missing or empty field, no rows at all.
    """
    path = Path(path)
    problems = []
    for number, line in _lines(path):
        place = f"{path}:{number}"
        row = _parse_row(line, place)
        question, answer, thinking, solution = (
            _text(row, key, place) for key in (*REQUIRED_KEYS, *OPTIONAL_KEYS)
        )
        assert question is not None and answer is not None
        signature = normalise(question)
        provenance = Provenance(
            source=path.name,
            family="",
            license=license,
            split=split or split_of(signature),
            generator="read_problems",
            version="1",
            seed=0,
            index=number,
        )
        problems.append(Problem(question, answer, thinking, solution, None, signature, provenance))
    if not problems:
        raise DataError(
            f"{path}: no problems in the file",
            fix='write one JSON object a line: {"question": "...", "answer": "..."}',
        )
    return problems


def assert_disjoint(**sets: Iterable[Problem]) -> None:
    """Raises DataError when two of the named sets share a problem, with one example of it."""
    hashes = {name: {p.content_hash: p for p in problems} for name, problems in sets.items()}
    for (left, ours), (right, theirs) in combinations(hashes.items(), 2):
        shared = ours.keys() & theirs.keys()
        if shared:
            example = ours[min(shared)].question
            raise DataError(
                f"the sets {left!r} and {right!r} share {len(shared)} problems, "
                f"for example {example[:120]!r}",
                fix="draw both by split, or remove the shared problems from the training side",
            )


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
                        fix="is this JSONL? one problem must stand on one line",
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


def _parse_row(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: not JSON: {error}", fix="write one JSON object on each line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected a JSON object, found {type(row).__name__}",
            fix='write {"question": "...", "answer": "..."}',
        )
    known = (*REQUIRED_KEYS, *OPTIONAL_KEYS)
    for key in row.keys() - set(known):
        absent = [name for name in known if name not in row]
        if near := get_close_matches(key, absent, n=1, cutoff=0.8):
            raise DataError(f"{place}: unknown key {key!r}", fix=f"did you mean {near[0]!r}?")
    return row


def _text(row: Mapping[str, Any], key: str, place: str) -> str | None:
    """The field as stripped text; numbers are accepted, since answers are often written bare."""
    value = row.get(key)
    if value is None and key in OPTIONAL_KEYS:
        return None
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
    if not value.strip():
        raise DataError(f"{place}: {key!r} is empty", fix="fill it in or delete the row")
    return value.strip()
