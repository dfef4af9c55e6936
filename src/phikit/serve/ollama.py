"""Ollama's requests and replies, over the same engine; enough for its clients and front ends.

One thing is not as there: a conversation longer than the context is an error, never cut.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from phikit.base.errors import ChatError, ContextOverflowError
from phikit.base.media import SPEECH, VISION
from phikit.chat.message import Message
from phikit.chat.tools import ToolCall, ToolDefinition
from phikit.generate.language_model import LanguageModel
from phikit.generate.language_model import Options as Drawing
from phikit.generate.request import Request
from phikit.models.decoder import DecoderConfig
from phikit.serve import ollama_schema as schema
from phikit.serve.errors import RefusedError, UnknownModelError
from phikit.serve.faults import OLLAMA, encode, fault_of
from phikit.serve.jobs import Asked, Job
from phikit.serve.limits import Limits
from phikit.serve.media import decode_base64
from phikit.serve.models import ModelShelf, ServedModel
from phikit.serve.openai import everything, said
from phikit.serve.openai_ask import random_seed, room, with_tools

log = logging.getLogger("phikit.serve")
CAPABILITIES = {VISION: "vision", SPEECH: "audio"}
"""What Ollama calls them."""

Asker = Callable[[LanguageModel], list[Asked]]
TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.9


def is_load(body: schema.Drawing) -> bool:
    """Whether nothing is asked, which means: load the model."""
    if isinstance(body, schema.ChatRequest):
        return not body.messages
    return isinstance(body, schema.GenerateRequest) and not (body.prompt or body.images)


def has_media(body: schema.Drawing) -> bool:
    """Whether there are images."""
    if isinstance(body, schema.ChatRequest):
        return any(message.images for message in body.messages)
    return isinstance(body, schema.GenerateRequest) and bool(body.images)


def chat_asker(body: schema.ChatRequest, limits: Limits) -> Asker:
    """What makes the engine's request of a conversation, once the model is known."""
    images: list[bytes] = []
    messages = [
        _message(message, f"messages.{place}", images, limits)
        for place, message in enumerate(body.messages)
    ]
    tools = tuple(_definition(tool) for tool in body.tools or ())
    if tools and body.format:
        raise RefusedError("format and tools cannot be asked for together", param="format")
    messages = with_tools(messages, tools)
    return lambda loaded: [_asked(loaded, messages, images, body, limits)]


def generate_asker(body: schema.GenerateRequest, limits: Limits) -> Asker:
    """The same for a prompt."""
    if body.raw:
        if body.images or body.system:
            raise RefusedError("a raw prompt has no images and no system text", param="raw")
        return lambda loaded: [_asked(loaded, body.prompt, [], body, limits)]
    images: list[bytes] = []
    asked = schema.Message(role="user", content=body.prompt, images=body.images)
    messages = [_message(asked, "prompt", images, limits)]
    if body.system:
        messages.insert(0, Message("system", body.system))

    def ask(loaded: LanguageModel) -> list[Asked]:
        # A model without a chat template can only go on with the text.
        if loaded.renderer.name == "text" and not images and not body.system:
            return [_asked(loaded, body.prompt, [], body, limits)]
        return [_asked(loaded, messages, images, body, limits)]

    return ask


def _message(message: schema.Message, where: str, images: list[bytes], limits: Limits) -> Message:
    content = message.content or ""
    if message.images and message.role != "user":
        raise RefusedError("only a user's message has images", param=f"{where}.images")
    marks = []
    for place, image in enumerate(message.images or ()):
        images.append(decode_base64(image, param=f"{where}.images.{place}"))
        marks.append(f"<|image_{len(images)}|>")
    if len(images) > limits.max_media:
        raise RefusedError(f"there are more than {limits.max_media} images", param="images")
    try:
        calls = tuple(
            ToolCall(call.function.name, call.function.arguments)
            for call in message.tool_calls or ()
        )
    except ChatError as error:
        raise RefusedError(error.what, param=f"{where}.tool_calls") from error
    thinking = message.thinking if message.role == "assistant" else None
    return Message(message.role, "".join((*marks, content)), thinking, tool_calls=calls)


def _definition(tool: schema.Tool) -> ToolDefinition:
    function = tool.function
    try:
        return ToolDefinition(function.name, function.description or "", function.parameters)
    except ChatError as error:
        raise RefusedError(error.what, param="tools", fix=error.fix) from error


def _asked(
    loaded: LanguageModel,
    prompt: str | Sequence[Message],
    images: Sequence[bytes],
    body: schema.Drawing,
    limits: Limits,
) -> Asked:
    options = body.options or schema.Options()
    drawing: Drawing = {
        "temperature": TEMPERATURE if options.temperature is None else options.temperature,
        "top_k": TOP_K if options.top_k is None else options.top_k or None,
        "top_p": TOP_P if options.top_p is None else options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repeat_penalty or 1.0,
        "seed": random_seed() if options.seed is None else options.seed,
        "stop": options.stop or (),
    }
    if body.format:
        drawing["schema"] = {"type": "object"} if body.format == "json" else body.format
    request = loaded.request(prompt, images=images, max_new_tokens=1, **drawing)
    length = _length(loaded, request, options, limits)
    return Asked(replace(request, max_new_tokens=length), not isinstance(prompt, str))


def _length(
    loaded: LanguageModel, request: Request, options: schema.Options, limits: Limits
) -> int:
    """Longest reply, by `num_predict` and `num_ctx`."""
    context, prompt = loaded.config.max_context, len(request.prompt)
    if options.num_ctx is not None and options.num_ctx > context:
        raise ContextOverflowError(
            f"num_ctx is {options.num_ctx}, and the model's context is {context}",
            fix="lower num_ctx, or leave it out",
        )
    bound = options.num_ctx or context
    if prompt >= bound:
        raise ContextOverflowError(
            f"the prompt has {prompt} tokens, and the context is {bound}",
            fix="shorten the conversation, or raise num_ctx; nothing is ever cut",
        )
    wanted = options.num_predict
    if wanted is None or wanted < 0:
        return min(bound - prompt, room(loaded, request.prompt, limits))
    if options.num_ctx is not None:
        # num_predict is a bound too: it may reach beyond a context the client chose by itself.
        return max(1, min(wanted, bound - prompt))
    return max(1, wanted)


# --- replies -------------------------------------------------------------------------------------


class Replies:
    """The answer to one request, whole or in pieces."""

    def __init__(self, job: Job, body: schema.Drawing) -> None:
        self._job, self._body = job, body

    @classmethod
    def said(cls, content: str, thinking: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        """The part of an object that says something."""
        raise NotImplementedError

    @classmethod
    def loaded(cls, body: schema.Drawing, served: ServedModel) -> dict[str, Any]:
        """What is answered when a model was only to be loaded."""
        durations = {"total_duration": 0, "load_duration": int(served.load_s * 1e9)}
        return {
            **_head(body),
            **cls.said("", "", ()),
            "done": True,
            "done_reason": "load",
            **durations,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        [each] = await everything(self._job)
        message = each.message
        assert message is not None
        thinking = "" if self._body.think is False else message.thinking or ""
        part = self.said(message.content, thinking, message.tool_calls)
        return {**_head(self._body), **part, **self._finished(each.finish_reason)}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in many; the last one has the counts."""
        async for [each] in said(self._job):
            calls = each.message.tool_calls if each.message is not None else ()
            thinking = "" if self._body.think is False else each.piece.thinking
            if each.piece.content or thinking or calls:
                part = self.said(each.piece.content, thinking, calls)
                yield {**_head(self._body), **part, "done": False}
            if each.finish_reason is not None:
                part = self.said("", "", ())
                yield {**_head(self._body), **part, **self._finished(each.finish_reason)}

    def _finished(self, reason: str | None) -> dict[str, Any]:
        job = self._job
        total_s = time.monotonic() - job.started
        first_s = job.first_token_s or total_s
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": int(total_s * 1e9),
            "load_duration": 0,
            "prompt_eval_count": job.prompt_tokens,
            "prompt_eval_duration": int(first_s * 1e9),
            "eval_count": job.sampled_tokens,
            "eval_duration": int((total_s - first_s) * 1e9),
        }


class ChatReplies(Replies):
    """Those of a conversation."""

    @classmethod
    def said(cls, content: str, thinking: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in calls
            ]
        return {"message": message}


class GenerateReplies(Replies):
    """Those of a prompt."""

    @classmethod
    def said(cls, content: str, thinking: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        return {"response": content, **({"thinking": thinking} if thinking else {})}


def _head(body: schema.Drawing) -> dict[str, Any]:
    return {"model": body.model, "created_at": _instant(time.time())}


async def as_lines(objects: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    """JSON objects, one a line; an answer that failed ends with its error."""
    try:
        async for each in objects:
            yield encode(each) + b"\n"
    except Exception as error:
        fault = fault_of(error)
        if fault.status == 500:
            log.exception("a stream failed")
        yield fault.body(OLLAMA) + b"\n"


# --- models --------------------------------------------------------------------------------------


def tags(shelf: ModelShelf) -> dict[str, Any]:
    """The models by name."""
    return {"models": [_tag(shelf, name) for name in shelf.names]}


def running(shelf: ModelShelf) -> dict[str, Any]:
    """The models in memory; they leave when memory is wanted, at no set time."""
    made = []
    for model in shelf.loaded:
        tag = _tag(shelf, model.name)
        del tag["modified_at"]
        never = _instant(datetime(9999, 1, 1, tzinfo=UTC).timestamp())
        context, stats = model.loaded.config.max_context, model.worker.stats()
        tag |= {"size": model.size, "size_vram": 0, "expires_at": never, "context_length": context}
        made.append({**tag, "running": stats.running, "waiting": stats.waiting})
    return {"models": made}


def show(shelf: ModelShelf, body: schema.ShowRequest) -> dict[str, Any]:
    """One model. Raises UnknownModelError if there is none of this name."""
    name = body.model or body.name or ""
    if name not in shelf.sources:
        raise UnknownModelError(f"there is no model {name!r} here")
    about = shelf.sources[name].about
    config: DecoderConfig | None = about.get("config")
    capabilities = ["completion"]
    capabilities += [CAPABILITIES[name] for name in about.get("senses", ()) if name in CAPABILITIES]
    if about.get("speaks_tools"):
        capabilities.append("tools")
    if about.get("thinks"):
        capabilities.append("thinking")
    info: dict[str, Any] = {"general.architecture": "phikit"}
    if config is not None:
        info |= {
            "phikit.context_length": config.max_context,
            "phikit.embedding_length": config.d_model,
            "phikit.block_count": config.num_layers,
            "phikit.attention.head_count": config.num_heads,
            "phikit.attention.head_count_kv": config.num_kv_heads,
        }
    return {
        "modelfile": f"FROM {name}\n",
        "parameters": "",
        "template": about.get("template", ""),
        "details": _details(about),
        "model_info": info,
        "capabilities": capabilities,
        "modified_at": _instant(about.get("modified_s", 0.0)),
    }


def _tag(shelf: ModelShelf, name: str) -> dict[str, Any]:
    about = shelf.sources[name].about
    return {
        "name": name,
        "model": name,
        "modified_at": _instant(about.get("modified_s", 0.0)),
        "size": about.get("size", 0),
        # Of the name and the file's time and size: to tell versions apart, not to check contents.
        "digest": sha256(
            f"{name} {about.get('modified_s')} {about.get('size')}".encode()
        ).hexdigest(),
        "details": _details(about),
    }


def _details(about: Mapping[str, Any]) -> dict[str, Any]:
    config = about.get("config")
    family = type(config).__name__.removesuffix("Config").lower() if config is not None else ""
    return {
        "parent_model": "",
        "format": "gguf" if str(about.get("path", "")).endswith(".gguf") else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": about.get("parameters", ""),
        "quantization_level": str(about.get("dtype", "")),
    }


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
