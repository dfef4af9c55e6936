"""How near is a reply to its reference? Error rates of speech and reading, and answers to pictures.

Every metric takes references and replies as two lists and gives one number for each pair, so that
means, intervals and tests are those of every other score. Error rates of a whole set weigh by
length: `word_error_rate` and `character_error_rate` take the set at once.

Sources: relaxed accuracy from ChartQA (arXiv 2203.10244, section 5), ANLS from ST-VQA
(1905.13648, section 4), the text normaliser after Whisper's basic one (2212.04356, appendix C).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from phikit.base.errors import DataError, MissingExtraError
from phikit.data.problem import Problem
from phikit.evals.scorer import Score, Scorer
from phikit.solve.solver import Reply

Metric = Callable[[str, str], float]
"""From a reference and a reply to a number from 0 to 1, 1 being right."""

TOLERANCE = 0.05
"""Of relaxed accuracy."""
ANLS_THRESHOLD = 0.5
"""Similarities below count nothing."""

_BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]*\)")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?|[-+]?\.\d+")
_LETTER = re.compile(r"\(?\b([A-Za-z])\b[).:]?")


def normalise_speech(text: str) -> str:
    """Text as transcripts are compared: no case, no punctuation, nothing in brackets, one space.

    Apostrophes go without a space ("don't" is "dont"), other marks with one; letters with accents
    stay what they are.
    """
    text = _BRACKETED.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    text = re.sub(r"['’ʼ]", "", text)
    letters = (" " if unicodedata.category(letter)[0] in "MSPZC" else letter for letter in text)
    return " ".join("".join(letters).split())


def word_error_rate(
    references: Sequence[str],
    replies: Sequence[str],
    *,
    normalise: Callable[[str], str] = normalise_speech,
) -> float:
    """Substitutions, deletions and insertions over the words of all references; may exceed 1.

    Raises:
        DataError: the lists differ in length, or the references hold no word.
        MissingExtraError: jiwer is not installed.
    """
    pairs = _pairs(references, replies, normalise)
    return float(_jiwer().wer([pair[0] for pair in pairs], [pair[1] for pair in pairs]))


def character_error_rate(
    references: Sequence[str],
    replies: Sequence[str],
    *,
    normalise: Callable[[str], str] = str.strip,
) -> float:
    """The same over characters, spaces included; by default case and punctuation count."""
    pairs = _pairs(references, replies, normalise)
    return float(_jiwer().cer([pair[0] for pair in pairs], [pair[1] for pair in pairs]))


def exact_match(reference: str, reply: str) -> float:
    """1 for equal texts; case, white space and a full stop at the end do not matter."""
    return float(_plain(reference) == _plain(reply))


def relaxed_accuracy(reference: str, reply: str) -> float:
    """1 for a number within 5 % of the reference; other references must match exactly.

    A percent sign divides by 100, thousands may be separated by commas, and of a reference 0 only 0
    is near.
    """
    wanted, found = _number(reference), _number(reply)
    if wanted is None:
        return exact_match(reference, reply)
    if found is None:
        return 0.0
    return float(abs(found - wanted) <= TOLERANCE * abs(wanted) * (1 + 1e-9))


def anls(references: str | Sequence[str], reply: str) -> float:
    """The similarity of the reply to the nearest reference, 0 where it is below a half.

    Similarity is 1 - edits / length of the longer, case and outer white space aside.

    Raises MissingExtraError if jiwer is not installed.
    """
    from_ = [references] if isinstance(references, str) else list(references)
    best = max((_similarity(_plain(each), _plain(reply)) for each in from_), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def multiple_choice(reference: str, reply: str) -> float:
    """1 if the reply's letter is the reference's: "B", "(b)", "B. a dog", "The answer is B."

    The first letter that stands alone at the reply's start counts, else the last one of it.
    """
    return float(choice_of(reply) == reference.strip().upper())


def choice_of(reply: str) -> str | None:
    """The letter that a reply chooses; None if there is none."""
    reply = reply.strip()
    first = _LETTER.match(reply)
    if first is not None:
        bare = len(reply) == len(first[0]) or first[0] != first[1]
        if bare:
            return first[1].upper()
    capitals = re.findall(r"\b([A-HJ-Z])\b(?!')", reply)
    return capitals[-1] if capitals else None


def metric_scorer(metric: Metric, *, at_least: float = 1.0) -> Scorer:
    """A scorer that calls a reply correct where the metric reaches `at_least`."""

    def judge(problem: Problem, reply: Reply) -> Score:
        if reply.error is not None:
            return Score("error", None, reply.error)
        content = reply.message.content.strip()
        if not reply.finished:
            return Score("truncated", content)
        if not content:
            return Score("unparsed")
        is_right = metric(problem.answer, content) >= at_least
        return Score("correct" if is_right else "wrong", content)

    return lambda pairs: [judge(problem, reply) for problem, reply in pairs]


def _pairs(
    references: Sequence[str], replies: Sequence[str], normalise: Callable[[str], str]
) -> list[tuple[str, str]]:
    if len(references) != len(replies):
        raise DataError(f"{len(references)} references and {len(replies)} replies")
    pairs = [(normalise(a), normalise(b)) for a, b in zip(references, replies, strict=True)]
    silent = next((i for i, (reference, _) in enumerate(pairs) if not reference), None)
    if not pairs or silent is not None:
        which = f"reference {silent} has" if pairs else "there are"
        raise DataError(f"{which} no words to compare", fix="leave silent references out")
    return pairs


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("jiwer", "eval") from error
    return jiwer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def _number(text: str) -> float | None:
    """The number that a text is, or ends with a unit; None for any other text."""
    plain = _plain(text).replace(",", "").lstrip("$€£").strip()
    is_percent = plain.endswith("%")
    plain = plain.removesuffix("%").strip()
    if not _NUMBER.fullmatch(plain):
        return None
    return float(plain) / (100 if is_percent else 1)


def _similarity(reference: str, reply: str) -> float:
    longer = max(len(reference), len(reply))
    if not longer:
        return 1.0
    if not reference:
        return 0.0
    edits = float(_jiwer().cer(reference, reply)) * len(reference)
    return 1 - edits / longer
