"""A router's replies as OpenAI's clients read them; `routing` in them says how they came about.

A router works in threads, since either side may keep one waiting. When a reader leaves, its work
ends with the next piece. What not every endpoint can do (images, several replies, their
log-probabilities) is not put to the router: the local model answers it alone.
"""

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from phikit.chat.message import Message
from phikit.generate.chat import ChatOptions
from phikit.generate.reply import Piece
from phikit.serve import openai_schema as schema
from phikit.serve.errors import RefusedError
from phikit.serve.openai import calls_of, form
from phikit.serve.openai_ask import Talk, random_seed, wanted_of, with_tools
from phikit.serve.router import RoutedReply, Router

THREADS = 64
"""Requests under way at once; more wait."""


class RoutedChats:
    """Answers chat completions through a router."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._threads = ThreadPoolExecutor(THREADS, "router")

    def entry(self) -> dict[str, Any]:
        """The router in a list of models."""
        name = self.router.config.name
        return {"id": name, "object": "model", "created": 0, "owned_by": "phikit"}

    def local_for(self, body: schema.ChatRequest, talk: Talk) -> str | None:
        """The local model's name for a request that it answers alone; None for what is routed.

        Raises RefusedError if the local model is not here.
        """
        param = _not_routable(body, talk)
        if param is None:
            return None
        what = "images and audio" if param == "messages" else param
        if self.router.local is None:
            raise RefusedError(
                f"{what} can be asked of the local model alone, and it is not here",
                param=param,
                fix=f"serve {self.router.config.local!r} beside the router",
            )
        self.router.log_local(f"{what}: the local model answers alone")
        return self.router.config.local

    async def whole(self, body: schema.ChatRequest, talk: Talk) -> dict[str, Any]:
        """A chat completion in one object.

        Raises as `Router.answer`.
        """
        messages, options = _asked(body, talk)
        loop = asyncio.get_running_loop()
        routed = await loop.run_in_executor(self._threads, self.router.answer, messages, options)
        message = routed.reply.message
        answer: dict[str, Any] = {"role": "assistant", "content": message.content}
        if message.tool_calls:
            answer |= {"content": message.content or None, "tool_calls": calls_of(message)}
        if message.thinking is not None:
            answer["reasoning_content"] = message.thinking
        choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": _reason(routed)}
        made = form("chatcmpl", "chat.completion", body.model)
        return made.made([choice], usage=_usage(routed), routing=_routing(routed))

    async def events(self, body: schema.ChatRequest, talk: Talk) -> AsyncIterator[dict[str, Any]]:
        """A chat completion in pieces; `routing` is in the last one with a choice."""
        messages, options = _asked(body, talk)
        made = form("chatcmpl", "chat.completion.chunk", body.model)

        def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return made.made([choice], **more)

        yield chunk({"role": "assistant", "content": ""})
        async for item in self._items(messages, options):
            if isinstance(item, Piece):
                parts = {"reasoning_content": item.thinking, "content": item.content}
                yield chunk({name: text for name, text in parts.items() if text})
                continue
            if calls := calls_of(item.reply.message):
                yield chunk({"tool_calls": [{"index": i, **c} for i, c in enumerate(calls)]})
            yield chunk({}, _reason(item), routing=_routing(item))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield made.made([], usage=_usage(item))

    async def _items(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> AsyncIterator[Piece | RoutedReply]:
        loop = asyncio.get_running_loop()
        stream = cast(Generator[Piece | RoutedReply], self.router.stream(messages, options))
        step = loop.run_in_executor(self._threads, next, stream, None)
        try:
            while (item := await asyncio.shield(step)) is not None:
                yield item
                step = loop.run_in_executor(self._threads, next, stream, None)
        finally:
            # A generator that is at work cannot be closed, so that waits until its step is done.
            step.add_done_callback(lambda _: self._threads.submit(stream.close))


def _not_routable(body: schema.ChatRequest, talk: Talk) -> str | None:
    """The first field that asks for what not every endpoint can do."""
    asks = {
        "n": (body.n or 1) > 1,
        "logprobs": bool(body.logprobs),
        "top_k": body.top_k is not None,
        "min_p": body.min_p is not None,
        "repetition_penalty": (body.repetition_penalty or 1.0) != 1.0,
        "adapter": body.adapter is not None,
        "tool_choice": wanted_of(body).is_call,
        "messages": bool(talk.images or talk.audio),
    }
    return next((param for param, is_there in asks.items() if is_there), None)


def _asked(body: schema.ChatRequest, talk: Talk) -> tuple[list[Message], ChatOptions]:
    """What the router is asked."""
    wanted = wanted_of(body)
    options = ChatOptions(
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p,
        seed=random_seed() if body.seed is None else body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        schema=wanted.schema,
    )
    return with_tools(talk.messages, wanted.tools), options


def _reason(routed: RoutedReply) -> str:
    if routed.reply.message.tool_calls:
        return "tool_calls"
    return "length" if routed.reply.finish_reason == "length" else "stop"


def _usage(routed: RoutedReply) -> dict[str, int]:
    prompt, said = routed.reply.prompt_tokens, routed.reply.reply_tokens
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _routing(routed: RoutedReply) -> dict[str, Any]:
    return {
        "route": routed.route,
        "reason": routed.reason,
        "confidence": routed.confidence,
        "cost": routed.cost,
        "note": routed.note,
    }
