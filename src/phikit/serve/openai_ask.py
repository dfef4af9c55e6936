"""OpenAI's requests as requests to the engine."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from phikit.base.errors import ChatError
from phikit.chat.message import Message
from phikit.chat.tools import MAX_CALLS, ToolCall, ToolDefinition, read_calls
from phikit.generate.language_model import LanguageModel, Options
from phikit.serve import openai_schema as schema
from phikit.serve.errors import RefusedError
from phikit.serve.jobs import Asked
from phikit.serve.limits import Limits
from phikit.serve.media import Fetcher, decode_base64

TEXT_TOKENS = 16
"""Longest text completion where the client names no length: OpenAI's own default."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation with its media, each image and clip marked in the text."""

    messages: list[Message]
    images: list[bytes]
    audio: list[bytes]


class Wanted(NamedTuple):
    """What a reply has to be, by `response_format` and `tool_choice`."""

    schema: Mapping[str, Any] | None = None
    tools: tuple[ToolDefinition, ...] = ()
    is_call: bool = False
    """The schema is that of tool calls, and the reply is nothing else."""


async def read_talk(
    messages: Sequence[schema.ChatMessage], fetcher: Fetcher, limits: Limits
) -> Talk:
    """The conversation, its URLs read.

    Raises RefusedError for media that cannot be read or are too many, and for broken tool calls.
    """
    talk = Talk([], [], [])
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if isinstance(message, schema.UserMessage):
            content = await _user_content(message.content, where, talk, fetcher, limits)
            talk.messages.append(Message("user", content))
        elif isinstance(message, schema.AssistantMessage):
            talk.messages.append(_assistant(message, where))
        elif isinstance(message, schema.ToolMessage):
            talk.messages.append(Message("tool", _text(message.content)))
        else:
            talk.messages.append(Message("system", _text(message.content)))
    return talk


def chat_asker(
    body: schema.ChatRequest, talk: Talk, limits: Limits
) -> Callable[[LanguageModel], list[Asked]]:
    """What makes the engine's request of a chat completion, once the model is known."""
    wanted = wanted_of(body)
    messages = with_tools(talk.messages, wanted.tools)
    check_samples(body.n or 1, limits)
    length = body.max_completion_tokens or body.max_tokens
    options = _options(body)
    if body.logprobs:
        options["top_log_probs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RefusedError("top_logprobs needs logprobs: true", param="top_logprobs")
    if wanted.schema is not None:
        options["schema"] = wanted.schema
    if wanted.is_call:
        options["may_think"] = False

    def ask(loaded: LanguageModel) -> list[Asked]:
        request = loaded.request(
            messages,
            images=talk.images,
            audio=talk.audio,
            max_new_tokens=length or 1,
            **options,
        )
        opening = closes = ()
        if wanted.is_call:
            special = loaded.tokenizer.special
            opening, closes = (special("<|tool_call|>"),), (special("<|/tool_call|>"),)
        prompt = [*request.prompt, *opening]
        request = replace(
            request,
            prompt=prompt,
            num_samples=body.n or 1,
            adapter=body.adapter,
            max_new_tokens=length or room(loaded, prompt, limits),
        )
        return [Asked(request, True, opening, closes)]

    return ask


def text_asker(
    body: schema.CompletionRequest, limits: Limits
) -> Callable[[LanguageModel], list[Asked]]:
    """The same for text completions: one engine's request for each prompt."""
    prompts = _prompts(body.prompt)
    check_samples(len(prompts) * (body.n or 1), limits)
    options = _options(body)
    options["top_log_probs"] = body.logprobs or 0

    def ask(loaded: LanguageModel) -> list[Asked]:
        asked = []
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else ""
            length = body.max_tokens or TEXT_TOKENS
            request = loaded.request(text, max_new_tokens=length, **options)
            ids = (
                request.prompt
                if isinstance(prompt, str)
                else check_ids(prompt, loaded, param="prompt")
            )
            changes = {"num_samples": body.n or 1, "adapter": body.adapter}
            asked.append(Asked(replace(request, prompt=ids, **changes), False))
        return asked

    return ask


def embedding_inputs(body: schema.EmbeddingRequest, limits: Limits) -> list[str | list[int]]:
    """The inputs, each text or ids. Raises RefusedError if they are too many."""
    inputs = _prompts(body.input)
    if len(inputs) > limits.max_embeddings:
        raise RefusedError(
            f"{len(inputs)} inputs, at most {limits.max_embeddings} may be", param="input"
        )
    return inputs


def check_ids(ids: list[int], loaded: LanguageModel, *, param: str) -> list[int]:
    """The ids, if the model has them. Raises RefusedError if not."""
    size = loaded.config.vocab_size
    if not all(0 <= id_ < size for id_ in ids):
        raise RefusedError(f"token ids go from 0 to {size - 1}", param=param)
    return ids


def room(loaded: LanguageModel, prompt: Sequence[int], limits: Limits) -> int:
    """Longest reply where no length is named; 1 if none fits, for the engine to say so."""
    return max(1, min(limits.new_tokens, loaded.config.max_context - len(prompt)))


def random_seed() -> int:
    """For requests without one."""
    return secrets.randbits(62)


def _options(body: schema.Drawing) -> Options:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "seed": random_seed() if body.seed is None else body.seed,
        "stop": stop,
    }


def check_samples(count: int, limits: Limits) -> None:
    """Raise RefusedError if a request asks for too many replies."""
    if count > limits.max_samples:
        raise RefusedError(
            f"{count} replies are asked for, at most {limits.max_samples} may be", param="n"
        )


def _prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


# --- messages ------------------------------------------------------------------------------------


async def _user_content(
    content: str | Sequence[schema.UserPart],
    where: str,
    talk: Talk,
    fetcher: Fetcher,
    limits: Limits,
) -> str:
    """The text, with a placeholder where each image and clip stands."""
    if isinstance(content, str):
        return content
    pieces: list[str] = []
    was_text = False
    for place, part in enumerate(content):
        param = f"{where}.content.{place}"
        is_text = isinstance(part, schema.TextPart)
        if isinstance(part, schema.TextPart):
            pieces.append(f"\n{part.text}" if was_text else part.text)
        elif isinstance(part, schema.ImagePart):
            talk.images.append(await fetcher.read(part.image_url.url, param=param))
            pieces.append(f"<|image_{len(talk.images)}|>")
        elif isinstance(part, schema.AudioPart):
            talk.audio.append(await fetcher.read(part.audio_url.url, param=param))
            pieces.append(f"<|audio_{len(talk.audio)}|>")
        else:
            talk.audio.append(decode_base64(part.input_audio.data, param=param))
            pieces.append(f"<|audio_{len(talk.audio)}|>")
        was_text = is_text
        count = len(talk.images) + len(talk.audio)
        if count > limits.max_media:
            raise RefusedError(
                f"there are more than {limits.max_media} images and clips", param=param
            )
    return "".join(pieces)


def _text(content: str | Sequence[schema.TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _assistant(message: schema.AssistantMessage, where: str) -> Message:
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(
            p.text if isinstance(p, schema.TextPart) else p.refusal for p in content
        )
    calls = tuple(
        _sent_call(call, f"{where}.tool_calls.{place}")
        for place, call in enumerate(message.tool_calls or ())
    )
    return Message("assistant", content, message.reasoning_content, tool_calls=calls)


def _sent_call(call: schema.SentCall, where: str) -> ToolCall:
    try:
        # Arguments come as JSON inside a text; the name is made JSON too and read with them.
        name, arguments = json.dumps(call.function.name), call.function.arguments or "{}"
        [read] = read_calls(f'{{"name": {name}, "arguments": {arguments}}}')
    except ValueError as error:
        raise RefusedError(f"{where} cannot be read: {error}", param=where) from error
    return read


# --- tools and formats ---------------------------------------------------------------------------


def wanted_of(body: schema.ChatRequest) -> Wanted:
    choice, tools = body.tool_choice, tuple(map(_definition, body.tools or ()))
    if choice == "none":
        tools = ()
    if isinstance(choice, schema.NamedTool) or choice == "required":
        named = [
            tool
            for tool in tools
            if not isinstance(choice, schema.NamedTool) or tool.name == choice.function.name
        ]
        if not named:
            raise RefusedError("tool_choice asks for a tool that is not there", param="tool_choice")
        calls = _calls_schema(named, one=body.parallel_tool_calls is False)
        _check_alone(body, "tool_choice")
        return Wanted(calls, tools, is_call=True)
    made = body.response_format
    if isinstance(made, schema.JSONObjectFormat | schema.JSONSchemaFormat):
        if tools:
            _check_alone(body, "response_format")
        if isinstance(made, schema.JSONObjectFormat):
            return Wanted({"type": "object"})
        return Wanted(made.json_schema.schema_)
    return Wanted(None, tools)


def _check_alone(body: schema.ChatRequest, param: str) -> None:
    """A reply cannot be free to call tools and held to a format at once."""
    if body.response_format is not None and body.response_format.type != "text":
        raise RefusedError(
            "response_format and tools cannot be asked for together",
            param=param,
            fix='send tool_choice: "none", or leave response_format out',
        )


def _definition(tool: schema.Tool) -> ToolDefinition:
    function = tool.function
    try:
        return ToolDefinition(function.name, function.description or "", function.parameters)
    except ChatError as error:
        raise RefusedError(error.what, param="tools", fix=error.fix) from error


def _calls_schema(tools: Sequence[ToolDefinition], *, one: bool) -> dict[str, Any]:
    """A list of calls to these tools, each with the arguments that it takes.

    Raises RefusedError if two tools define different things by one name.
    """
    shared: dict[str, Any] = {}
    for tool in tools:
        for name, definition in dict(tool.parameters.get("$defs") or {}).items():
            if shared.setdefault(name, definition) != definition:
                raise RefusedError(
                    f"two tools define {name!r} differently in $defs",
                    param="tools",
                    fix="give the definitions different names, or force one tool by its name",
                )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": _without(tool.parameters, "$defs") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    most = 1 if one else MAX_CALLS
    return {"$defs": shared, "type": "array", "items": items, "minItems": 1, "maxItems": most}


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def with_tools(messages: Sequence[Message], tools: tuple[ToolDefinition, ...]) -> list[Message]:
    """The tools are offered by the first system message, or by one of their own."""
    if not tools:
        return list(messages)
    for place, message in enumerate(messages):
        if message.role == "system":
            return [*messages[:place], replace(message, tools=tools), *messages[place + 1 :]]
    return [Message("system", "", tools=tools), *messages]
