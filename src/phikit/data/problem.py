"""A problem with a checkable answer, where it came from, and how one is read from a file.

`Problem` is the one record that generation, distillation, reinforcement learning and evaluation
exchange. Its signature says what is asked without saying how: for generated problems the
structure and the numbers, for outside data the normalised question. Equality of signatures is
what "the same problem" means when splits are kept apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data.rows import read_rows
from phikit.data.split import Split, content_hash, split_of

REQUIRED_KEYS = ("question", "answer")
OPTIONAL_KEYS = ("thinking", "solution")


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
    for number, row in read_rows(path, required=REQUIRED_KEYS, optional=OPTIONAL_KEYS):
        question, answer = row["question"], row["answer"]
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
        working = (row.get("thinking"), row.get("solution"), None)
        problems.append(Problem(question, answer, *working, signature, provenance))
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
