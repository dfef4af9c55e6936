"""Conversations as the JSON of OpenAI's chat completions, and its answers as ours.

Only what most servers agree on is written. What is read is a stranger's: checked by type, and what
cannot be used is an error.

Source: OpenAI's API reference (chat/completions). `reasoning_content` is how DeepSeek, vLLM and
llama.cpp pass thinking, `reasoning` how OpenRouter and newer vLLM do.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phikit.base.errors import RemoteError
from phikit.chat.message import Message
from phikit.chat.tools import ToolCall, ToolDefinition, read_calls
from phikit.chat.turns import split_thinking
from phikit.generate.chat import ChatOptions, ChatReply
from phikit.generate.reply import Piece

MOST_TOKENS = 100_000_000
"""An endpoint that counts more than this counts wrongly."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


_Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class _Usage(_Part):
    prompt_tokens: _Count
    completion_tokens: _Count = 0


class _Function(_Part):
    """Whole, or in a stream the next characters."""

    name: str | None = None
    arguments: str | None = None


class _Call(_Part):
    index: _Count = 0
    function: _Function


class _LogProb(_Part):
    logprob: Annotated[float, Field(le=1e-3, allow_inf_nan=False)]


class _LogProbs(_Part):
    content: list[_LogProb] | None = None


class _Said(_Part):
    """A whole message, or in a stream its next characters."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None

    @property
    def thinking(self) -> str | None:
        return self.reasoning_content or self.reasoning or None


class _Choice(_Part):
    message: _Said
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None


class _Answer(_Part):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Delta(_Part):
    delta: _Said = _Said()
    finish_reason: str | None = None


class _Chunk(_Part):
    """One event of a stream; the one with the usage has no choices."""

    choices: list[_Delta]
    usage: _Usage | None = None


_Shape = TypeVar("_Shape", bound=_Part)


def request_body(messages: Sequence[Message], options: ChatOptions) -> dict[str, Any]:
    """What is asked; the model's name and the longest reply are left to the caller.

    The thinking of earlier turns is left out: no endpoint takes it.
    """
    body: dict[str, Any] = {
        "messages": _turns(messages),
        "temperature": options.temperature,
        "seed": options.seed,
    }
    if tools := [_tool(tool) for message in messages for tool in message.tools]:
        body["tools"] = tools
    if options.top_p is not None:
        body["top_p"] = options.top_p
    if options.stop:
        body["stop"] = list(options.stop)
    if options.schema is not None:
        schema = {"name": "reply", "schema": dict(options.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if options.num_samples > 1:
        body["n"] = options.num_samples
    return body


def read_answer(content: bytes, *, sent_bytes: int, num_samples: int) -> list[ChatReply]:
    """The replies in the body of an answer.

    Args:
        sent_bytes: size of the request. Where an endpoint counts no tokens, bytes stand for them,
            which are never fewer.

    Raises:
        RemoteError: it is no chat completion of `num_samples` replies.
    """
    answer = _read(content, _Answer)
    if len(answer.choices) != num_samples:
        raise malformed(f"{len(answer.choices)} replies came, {num_samples} were asked for")
    usage = answer.usage or _bytes_as_tokens(sent_bytes, len(content))
    return [
        _reply(
            _message(choice.message),
            choice.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            # The endpoint counts all replies together.
            reply_tokens=usage.completion_tokens * (i + 1) // num_samples
            - usage.completion_tokens * i // num_samples,
            log_probs=choice.logprobs,
        )
        for i, choice in enumerate(answer.choices)
    ]


def read_stream(chunks: Iterable[bytes], *, sent_bytes: int) -> Generator[Piece, None, ChatReply]:
    """Yields the pieces of a streamed answer, and returns the whole; `sent_bytes` as above.

    Raises:
        RemoteError: it is no stream of a chat completion, or it ends early.
    """
    content, thinking, reason, usage, size = list[str](), list[str](), None, None, 0
    calls: dict[int, _Function] = {}
    for line in _lines(chunks):
        size += len(line)
        field, _, data = line.partition(b":")
        if field != b"data" or data.strip() == b"[DONE]":
            continue
        chunk = _read(data, _Chunk)
        usage = chunk.usage or usage
        for choice in chunk.choices[:1]:
            piece = Piece(choice.delta.content or "", choice.delta.thinking or "")
            content.append(piece.content)
            thinking.append(piece.thinking)
            _grow(calls, choice.delta.tool_calls or [])
            reason = choice.finish_reason or reason
            if any(piece):
                yield piece
    if reason is None:
        raise RemoteError("the endpoint's answer ended early", may_be_billed=True)
    said = _Said(
        content="".join(content),
        reasoning_content="".join(thinking),
        tool_calls=[_Call(function=calls[index]) for index in sorted(calls)],
    )
    usage = usage or _bytes_as_tokens(sent_bytes, size)
    return _reply(
        _message(said),
        reason,
        prompt_tokens=usage.prompt_tokens,
        reply_tokens=usage.completion_tokens,
        log_probs=None,
    )


def malformed(reason: str) -> RemoteError:
    """The error that says that an answer cannot be used."""
    return RemoteError(
        f"the endpoint's answer is no chat completion: {reason}",
        fix="check base_url: it ends where /chat/completions begins",
        may_be_billed=True,
    )


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages; calls are numbered, and the tools' messages answer them in their order."""
    turns: list[dict[str, Any]] = []
    called = answered = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                _called(call, f"call_{called + i}") for i, call in enumerate(message.tool_calls)
            ]
            called += len(message.tool_calls)
        if message.role == "tool":
            turn["tool_call_id"] = f"call_{answered}"
            answered += 1
        turns.append(turn)
    return turns


def _called(call: ToolCall, name: str) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _read(content: bytes, shape: type[_Shape]) -> _Shape:
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise malformed(f"{where}: {fault['msg']}".removeprefix(": ")[:200]) from None


def _message(said: _Said) -> Message:
    """What the assistant said, its thinking apart even where the endpoint left it in the text."""
    calls = tuple(_read_call(call.function) for call in said.tool_calls or ())
    message = Message("assistant", said.content or "", said.thinking, tool_calls=calls)
    return message if message.thinking is not None else split_thinking(message)


def _read_call(function: _Function) -> ToolCall:
    text = f'{{"name": {json.dumps(function.name)}, "arguments": {function.arguments or "{}"}}}'
    try:
        [call] = read_calls(text)
    except ValueError as error:
        raise malformed(f"a tool call: {error}"[:200]) from None
    return call


def _reply(
    message: Message,
    reason: str | None,
    *,
    prompt_tokens: int,
    reply_tokens: int,
    log_probs: _LogProbs | None,
) -> ChatReply:
    if reason == "content_filter":
        raise RemoteError("the endpoint's filter stopped the reply", may_be_billed=True)
    values = [token.logprob for token in (log_probs.content or ())] if log_probs else []
    return ChatReply(
        message=message,
        finish_reason="length" if reason == "length" else "stop",
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        mean_log_prob=fmean(values) if values else None,
        min_log_prob=min(values, default=None),
    )


def _bytes_as_tokens(sent_bytes: int, came_bytes: int) -> _Usage:
    return _Usage(prompt_tokens=sent_bytes, completion_tokens=came_bytes)


def _grow(calls: dict[int, _Function], deltas: Sequence[_Call]) -> None:
    """Add the next characters to the calls of a stream."""
    for delta in deltas:
        old, new = calls.get(delta.index, _Function()), delta.function
        calls[delta.index] = _Function(
            name=old.name or new.name,
            arguments=(old.arguments or "") + (new.arguments or ""),
        )


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a byte stream, without their ends; an unfinished last one is left out."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        *lines, rest = rest.split(b"\n")
        yield from (bytes(line).rstrip(b"\r") for line in lines)
