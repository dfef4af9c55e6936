"""A message of a conversation."""

from dataclasses import dataclass, field
from typing import Literal

from phikit.chat.tools import ToolCall, ToolDefinition

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        content: the text. A user's text marks where media stand: `<|image_1|>`, `<|audio_1|>`.
        thinking: of an assistant alone; None means no thought section at all.
        tools: what a system message offers.
        tool_calls: what an assistant message calls, after its content.
        note: what could not be read in a parsed reply, and why; for people, never rendered.
    """

    role: Role
    content: str
    thinking: str | None = None
    tools: tuple[ToolDefinition, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    note: str | None = field(default=None, compare=False)
