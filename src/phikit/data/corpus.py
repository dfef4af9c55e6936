"""Pre-training documents for the nano model: what it must know before it can learn to reason.

A model of two million parameters that is trained on ordinary text writes fluent traces about the
wrong numbers. Two kinds of documents repair that: single-operation facts (the arithmetic) and copy
documents, "text Again: text" (the copying). The other kinds teach the vocabulary and the shape of
a conversation. No document holds a thinking trace, so that the base model answers directly and
mid-training has something to show.

Every problem in the corpus belongs to the train split: no held-out problem is seen here either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal, get_args

from pydantic import Field, field_validator

from phikit.base.config import Config
from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data import prose
from phikit.data.problem import Problem, Provenance
from phikit.data.procedural.draft import Level
from phikit.data.procedural.generate import LICENSE, stream
from phikit.data.procedural.lexicon import ITEMS, KNOWN, MEANINGS, PEOPLE, UNITS

Kind = Literal["fact", "story", "copy", "chat", "definition", "prose"]

SOURCE = "phikit.corpus"
VERSION = "1"
OPERATIONS = (("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by"))
OPERATION_WEIGHTS = (0.36, 0.36, 0.14, 0.14)  # about as often as traces use them


class CorpusMixture(Config):
    """Shares of the kinds of documents, and the level of the numbers in them."""

    weights: dict[Kind, float] = Field(
        default={
            "fact": 0.32,
            "story": 0.22,
            "copy": 0.21,
            "chat": 0.16,
            "definition": 0.05,
            "prose": 0.04,
        },
        description="relative number of documents of each kind; a kind not named gets none",
    )
    level: Level = Level()

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[Kind, float]) -> dict[Kind, float]:
        if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
            raise ValueError("weights must not be negative and one must be positive")
        return weights


@dataclass(frozen=True, slots=True)
class Document:
    """One pre-training document: plain text, or the messages of a conversation to render."""

    kind: Kind
    content: str | tuple[Message, ...]
    provenance: Provenance


def pretraining_documents(
    *, seed: int, count: int, mixture: CorpusMixture | None = None
) -> Iterator[Document]:
    """Yields `count` documents; a longer corpus of the same seed begins with the shorter one.

    Raises DataError when prose is wanted and this Python has no documentation to take it from.
    """
    mixture = mixture or CorpusMixture()
    kinds = tuple(kind for kind in get_args(Kind) if mixture.weights.get(kind, 0) > 0)
    weights = [mixture.weights[kind] for kind in kinds]
    writers = {kind: _writer(kind, seed, mixture.level) for kind in kinds}
    rng = Random(_derived_seed(seed, "kinds"))
    for index in range(count):
        kind = rng.choices(kinds, weights)[0]
        yield Document(kind, next(writers[kind]), _provenance(kind, seed, index))


Content = str | tuple[Message, ...]


def _writer(kind: Kind, seed: int, level: Level) -> Iterator[Content]:
    """An endless supply of one kind, independent of the other kinds."""
    own_seed = _derived_seed(seed, kind)
    writers: dict[Kind, Callable[[int, Level], Iterator[Content]]] = {
        "fact": _facts,
        "story": _stories,
        "copy": _copies,
        "chat": _chats,
        "definition": _definitions,
        "prose": _prose,
    }
    return writers[kind](own_seed, level)


def _derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: no problem stream is shared with a training stage."""
    digest = blake2b(f"{SOURCE}|{VERSION}|{seed}|{purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _provenance(kind: Kind, seed: int, index: int) -> Provenance:
    python = kind == "prose"
    return Provenance(
        source=prose.SOURCE if python else SOURCE,
        family=kind,
        license=prose.LICENSE if python else LICENSE,
        split="train",
        generator=SOURCE,
        version=VERSION,
        seed=seed,
        index=index,
    )


def _facts(seed: int, level: Level) -> Iterator[str]:
    """Four to seven facts, in symbols or in words."""
    rng = Random(seed)
    while True:
        in_words = rng.random() < 0.25
        facts = [_fact(rng, level, in_words=in_words) for _ in range(rng.randint(4, 7))]
        yield ". ".join(facts) + "." if in_words else "\n".join(facts)


def _fact(rng: Random, level: Level, *, in_words: bool) -> str:
    symbol, word = rng.choices(OPERATIONS, OPERATION_WEIGHTS)[0]
    if symbol in "+-":
        whole = rng.randint(1, level.max_result)
        part = rng.randint(0, min(whole, level.max_addend))
        if rng.random() < 0.5:
            part = whole - part
        left, right, result = (
            (part, whole - part, whole) if symbol == "+" else (whole, part, whole - part)
        )
    else:
        first = rng.randint(1, level.max_factor)
        second = rng.randint(1, min(level.max_factor, level.max_result // first))
        product = first * second
        left, right, result = (
            (first, second, product) if symbol == "*" else (product, first, second)
        )
    if in_words:
        return f"{left} {word} {right} is {result}"
    return f"{left} {symbol} {right} = {result}"


def _problems(seed: int, level: Level, *steps: int) -> Iterator[Problem]:
    return stream(seed=seed, split="train", steps=dict.fromkeys(steps, 1.0), level=level)


def _stories(seed: int, level: Level) -> Iterator[str]:
    """A one-step problem and the equation that answers it."""
    for problem in _problems(seed, level, 1):
        assert problem.thinking is not None
        equation = problem.thinking.partition(": ")[2]
        yield f"{problem.question} {equation}."


def _chats(seed: int, level: Level) -> Iterator[tuple[Message, ...]]:
    """A question answered at once, without thinking."""
    for problem in _problems(seed, level, 1, 2, 3, 4, 5):
        assert problem.solution is not None
        yield (
            Message(role="user", content=problem.question),
            Message(role="assistant", content=problem.solution),
        )


def _copies(seed: int, level: Level) -> Iterator[str]:
    """A text with numbers, twice."""
    rng = Random(seed)
    problems = _problems(_derived_seed(seed, "sentences"), level, 2, 3, 4, 5)
    while True:
        text = _numbers(rng, level) if rng.random() < 0.35 else _opening(rng, next(problems))
        yield f"{text} Again: {text}"


def _opening(rng: Random, problem: Problem) -> str:
    """The first one to three sentences of a question."""
    sentences = problem.question.split(". ")[: rng.randint(1, 3)]
    return ". ".join(sentences).rstrip(".?") + "."


def _numbers(rng: Random, level: Level) -> str:
    """A row of numbers, or who has how many of what."""
    numbers = [rng.randint(0, level.max_result) for _ in range(rng.randint(3, 7))]
    if rng.random() < 0.5:
        return ", ".join(map(str, numbers)) + "."
    people = rng.sample(PEOPLE[: level.num_names], 3)
    items = rng.sample(ITEMS[: level.num_items], 3)
    return " ".join(
        f"{person.name} has {2 + number} {item.many}."
        for person, item, number in zip(people, items, numbers, strict=False)
    )


def _definitions(seed: int, level: Level) -> Iterator[str]:
    """One to three sentences on what a word means or how large a unit is."""
    rng = Random(seed)
    while True:
        yield " ".join(_definition(rng, level) for _ in range(rng.randint(1, 3)))


def _definition(rng: Random, level: Level) -> str:
    number = rng.randint(2, level.max_factor)
    choice = rng.random()
    if choice < 0.4:
        return rng.choice(KNOWN).definition
    if choice < 0.6:
        return rng.choice(MEANINGS)
    if choice < 0.8:
        unit = rng.choice(UNITS)
        return f"{number} {unit.large.many} are {number * unit.size} {unit.small.many}."
    return rng.choice(
        (
            f"Twice {number} is {2 * number}.",
            f"Half of {2 * number} is {number}.",
            f"{number} dozen is {12 * number}.",
            f"{number} pairs are {2 * number}.",
        )
    )


def _prose(seed: int, level: Level) -> Iterator[str]:
    """Paragraphs of the documentation of Python, shuffled anew each time they run out."""
    paragraphs = list(prose.paragraphs())
    if not paragraphs:
        raise DataError(
            "this Python carries no documentation to take prose from",
            fix="leave out 'prose' from the weights of the corpus mixture",
        )
    rng = Random(seed)
    while True:
        rng.shuffle(paragraphs)
        yield from paragraphs
