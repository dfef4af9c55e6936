"""Readable transcripts: what the model was asked, what it thought, what it said, and the verdict.

Numbers hide how a model fails; a run keeps a few replies of every status in `samples/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phikit.base.files import write_atomic
from phikit.evals.scorer import STATUSES, Status
from phikit.evals.task import EvalResult, ProblemRecord, ReplyRecord

_RULE = "─" * 78


class Transcript(NamedTuple):
    """One reply in its parts; `thinking` is None when the model did not think."""

    question: str
    thinking: str | None
    answer: str
    gold: str
    status: Status
    extracted: str | None
    reason: str | None
    num_tokens: int
    steps: int | None
    family: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a stage of results.json carries it under `transcripts`."""
        return self._asdict()


def transcripts(result: EvalResult, *, per_status: int | None = None) -> list[Transcript]:
    """Transcripts of an evaluation, in its order.

    Args:
        per_status: keep the first so many of each status; None keeps all.
    """
    left = dict.fromkeys(STATUSES, per_status)
    kept = []
    for record in result.records:
        for reply in record.replies:
            room = left[reply.status]
            if room == 0:
                continue
            left[reply.status] = None if room is None else room - 1
            kept.append(_transcript(record, reply))
    return kept


def render_transcript(transcript: Transcript) -> str:
    """One transcript as text."""
    t = transcript
    head = f"{t.status.upper()}   gold: {t.gold}   extracted: {_shown(t.extracted)}"
    facts = f"{t.num_tokens} tokens"
    if t.family:
        facts += f", {t.family}"
    if t.steps is not None:
        facts += f", {t.steps} steps"
    parts = [_RULE, f"{head}   ({facts})"]
    if t.reason is not None:
        parts.append(f"reason: {t.reason}")
    parts += ["", "Question", t.question, ""]
    if t.thinking is not None:
        parts += ["Thinking", t.thinking, ""]
    parts += ["Answer", t.answer or "(nothing)", ""]
    return "\n".join(parts)


def write_transcripts(path: Path, kept: Sequence[Transcript]) -> None:
    """Write transcripts to one text file, usually `samples/NAME.txt`.

    Raises:
        StorageError: the disk is full or closed to us.
    """
    write_atomic(path, "\n".join(render_transcript(transcript) for transcript in kept))


def _transcript(record: ProblemRecord, reply: ReplyRecord) -> Transcript:
    return Transcript(
        question=record.question,
        thinking=reply.thinking,
        answer=reply.answer,
        gold=record.gold,
        status=reply.status,
        extracted=reply.extracted,
        reason=reply.reason,
        num_tokens=reply.num_tokens,
        steps=record.steps,
        family=record.family,
    )


def _shown(answer: str | None) -> str:
    return "none" if answer is None else answer
