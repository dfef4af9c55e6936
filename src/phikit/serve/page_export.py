"""A conversation as a file: Markdown for people, JSON for programs."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from phikit.chat.history import Conversation, Turn

_HEADINGS = {"user": "You", "system": "System", "tool": "Tool"}


def to_json(conversation: Conversation, turns: Sequence[Turn]) -> str:
    """All that is known of a conversation, as one JSON object."""
    values = conversation._asdict() | {"turns": [turn.to_dict() for turn in turns]}
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def to_markdown(conversation: Conversation, turns: Sequence[Turn]) -> str:
    """A conversation to be read; thinking is quoted, attached files are named."""
    begun = datetime.fromtimestamp(conversation.created, UTC)
    parts = [f"# {conversation.title}", f"{begun:%Y-%m-%d %H:%M} UTC"]
    for turn in turns:
        message = turn.message
        parts.append(f"## {_HEADINGS.get(message.role, turn.model)}")
        parts += [f"*{medium.kind}: {Path(medium.path or '').name}*" for medium in turn.media]
        if message.thinking is not None:
            lines = ("Thinking:", "", *message.thinking.splitlines())
            parts.append("\n".join(f"> {line}".rstrip() for line in lines))
        parts.append(message.content)
        if turn.tokens is not None and turn.seconds:
            parts.append(f"*{turn.tokens} tokens, {turn.tokens / turn.seconds:.1f} tokens/s*")
    return "\n\n".join(part for part in parts if part) + "\n"
