"""A message of a conversation."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Only an assistant thinks; `thinking` None means no thought section at all."""

    role: Role
    content: str
    thinking: str | None = None
