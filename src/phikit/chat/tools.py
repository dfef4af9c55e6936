"""Tools that a model may call, and its calls, as the JSON that stands in a conversation.

What is unusual: a reply is a stranger's text, so reading calls out of it is bounded in size, and
what cannot be read is refused with a reason instead of guessed at.

Source: function calling on the card of microsoft/Phi-4-mini-instruct: the system turn carries a
JSON list of `{"name", "description", "parameters"}`, a call is `{"name", "arguments"}`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phikit.base.errors import ChatError

MAX_CALL_CHARS = 65_536
MAX_CALLS = 32


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool offered to the model.

    Attributes:
        parameters: what it takes, JSON values (by habit a JSON schema).

    Raises:
        ChatError: the parameters are not JSON.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_json(self.parameters, f"the parameters of the tool {self.name!r}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model makes.

    Raises:
        ChatError: the arguments are not JSON.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_json(self.arguments, f"the arguments of the call to {self.name!r}")


def tools_json(tools: Sequence[ToolDefinition]) -> str:
    """The list that stands between `<|tool|>` and `<|/tool|>`."""
    return _dump(
        [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in tools
        ]
    )


def calls_json(calls: Sequence[ToolCall]) -> str:
    """The list that stands between `<|tool_call|>` and `<|/tool_call|>`."""
    return _dump([{"name": c.name, "arguments": dict(c.arguments)} for c in calls])


def read_calls(text: str) -> list[ToolCall]:
    """The calls in a JSON list, or in a single JSON object; inverts `calls_json`.

    Raises:
        ValueError: it is not such JSON, or there is too much of it.
    """
    if len(text) > MAX_CALL_CHARS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CALL_CHARS} are read")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_CALLS:
        raise ValueError(f"{len(entries)} calls, at most {MAX_CALLS} are read")
    return [_read_call(entry) for entry in entries]


def _read_call(entry: Any) -> ToolCall:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError('a call is an object with a "name"')
    arguments = entry.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is an object')
    try:
        return ToolCall(entry["name"], arguments)
    except ChatError as error:  # numbers beyond a float's range, half of a surrogate pair
        raise ValueError(error.what) from error


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_json(value: Mapping[str, Any], what: str) -> None:
    """Refuse what would not come back as it went: keys that are no strings, tuples, NaN."""
    try:
        text = _dump(dict(value))
        text.encode()
        same = json.loads(text) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{what} are not JSON: {error}") from error
    if not same:
        raise ChatError(f"{what} are not JSON: {value!r}", fix="use strings as keys, and lists")
