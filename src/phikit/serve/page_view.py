"""How a conversation looks on the chat page: its turns, and the reply that is being made."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phikit.base.errors import PhikitError
from phikit.chat.history import Turn
from phikit.serve.page_reply import LiveReply, Progress


@dataclass(frozen=True, slots=True)
class View:
    """What the page shows of a conversation.

    Attributes:
        messages: as `gradio.Chatbot` takes them.
        places: for each message the number of its turn.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def _add(self, number: int, role: str, content: Any, **metadata: Any) -> None:
        message = {"role": role, "content": content}
        self.messages.append({**message, "metadata": metadata} if metadata else message)
        self.places.append(number)


def view(turns: Sequence[Turn], reply: LiveReply | None) -> View:
    """The messages of a conversation; `reply` is the one that is being made, or that failed."""
    shown = View()
    for number, turn in enumerate(turns):
        if turn.message.role == "user":
            for medium in turn.media:
                shown._add(number, "user", {"path": medium.path})
            if turn.message.content:
                shown._add(number, "user", turn.message.content)
        elif turn.message.role == "assistant":
            _add_reply(shown, number, turn)
    is_answered = bool(turns) and turns[-1].message.role == "assistant"
    if reply is not None and not (reply.done and is_answered and reply.progress.error is None):
        _add_progress(shown, len(turns), reply.model, reply.progress)
    return shown


def _add_reply(shown: View, number: int, turn: Turn) -> None:
    message = turn.message
    if message.thinking is not None:
        seconds = turn.settings.get("thinking_s")
        title = "Thought" if seconds is None else f"Thought for {seconds:.0f} s"
        shown._add(number, "assistant", message.thinking, title=title, status="done")
    if message.content:
        shown._add(number, "assistant", message.content)
    shown._add(number, "assistant", figures(turn))


def _add_progress(shown: View, number: int, model: str, progress: Progress) -> None:
    if progress.phase == "loading":
        shown._add(number, "assistant", _waiting(f"Loading {model} …"))
    elif progress.phase == "reading":
        shown._add(number, "assistant", _waiting("Reading the question …"))
    if progress.thinking is not None:
        is_over = progress.phase != "thinking"
        verb = "Thought for" if is_over else "Thinking …"
        title = f"{verb} {progress.thinking_s or 0:.0f} s"
        # "done" keeps it folded; whoever opens it can read along.
        shown._add(number, "assistant", progress.thinking, title=title, status="done")
    if progress.text:
        shown._add(number, "assistant", progress.text)
    if progress.error is not None:
        shown._add(number, "assistant", failure(progress.error))


def figures(turn: Turn) -> str:
    """The small line below a reply: tokens, speed, and why it ended if not by itself."""
    parts = []
    if turn.tokens is not None:
        parts.append(_count(turn.tokens, "token"))
        if turn.seconds:
            parts.append(f"{turn.tokens / turn.seconds:.1f} tokens/s")
    if turn.prompt_tokens is not None:
        parts.append(f"prompt of {_count(turn.prompt_tokens, 'token')}")
    if turn.finish_reason == "cancelled":
        parts.append("stopped")
    elif turn.finish_reason == "length":
        parts.append("cut at the longest reply allowed")
    return f'<span class="figures">{html.escape(" · ".join([*parts, turn.model]))}</span>'


def _waiting(text: str) -> str:
    return f'<span class="waiting">{html.escape(text)}</span>'


def failure(error: PhikitError) -> str:
    """An error as a message of the page."""
    fix = "" if error.fix is None else f"<br><small>Next: {html.escape(error.fix)}</small>"
    return f'<div class="failure"><b>{html.escape(error.what)}</b>{fix}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
