"""One reply on its way to the chat page, independent of the tabs that look at it.

A tab may be reloaded, closed, or opened twice while a reply is made. So the reply is a task of the
server's event loop; tabs watch it, and it is written down when it ends whether anybody watches or
not. It is bounded by its own length, and any tab may stop it.

What is shown is what `parse` makes of all tokens so far: the renderer stays the only place that
knows what thinking looks like.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phikit.base.errors import ContextOverflowError, PhikitError
from phikit.chat.history import Turn
from phikit.chat.message import Message
from phikit.generate.language_model import LanguageModel
from phikit.generate.request import Request
from phikit.serve.models import ModelShelf, ServedModel

REFRESH_S = 0.08
"""How often a growing reply is looked at."""

Phase = Literal["loading", "reading", "thinking", "saying", "done"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How replies of the page are drawn."""

    temperature: float = 0.6
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    """A reply may take this much, or what the context leaves."""
    seed: int = 0
    system: str | None = None
    remembers: bool = True
    """Whether a question is asked together with the turns before it."""
    adapter: str | None = None
    """None is the one that the question's media call for."""


class Question(NamedTuple):
    """What a model is asked."""

    messages: Sequence[Message]
    images: Sequence[Path] = ()
    clips: Sequence[Path] = ()


class Progress(NamedTuple):
    """A reply so far."""

    phase: Phase
    text: str = ""
    thinking: str | None = None
    thinking_s: float | None = None
    error: PhikitError | None = None


class LiveReply:
    """Asks a model in the background of the running event loop.

    Args:
        shelf: where the model is, or is loaded to.
        keep: called with the reply when it ends, stopped ones included; not if it said nothing.
    """

    def __init__(
        self,
        shelf: ModelShelf,
        model: str,
        question: Question,
        settings: Settings,
        *,
        keep: Callable[[Turn], None],
    ) -> None:
        self.model, self.settings = model, settings
        self.progress = Progress("loading")
        self._shelf, self._question, self._keep = shelf, question, keep
        self._is_stopped = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def done(self) -> bool:
        return self._task.done()

    def stop(self) -> None:
        """End it; what has been said is kept."""
        self._is_stopped = True

    async def watch(self) -> AsyncIterator[Progress]:
        """Its progress whenever that has changed, the last one included."""
        shown = None
        while True:
            is_last = self.done
            if self.progress != shown:
                shown = self.progress
                yield shown
            if is_last:
                return
            await asyncio.wait([self._task], timeout=REFRESH_S)

    async def _run(self) -> None:
        error: PhikitError | None = None
        try:
            async with self._shelf.acquire_async(self.model) as served:
                if not self._is_stopped:
                    await self._answer(served)
        except ContextOverflowError as overflow:
            fix = "start a new chat, send no earlier turns, or shorten the question"
            error = ContextOverflowError(overflow.what, fix=fix)
        except PhikitError as known:
            error = known
        except Exception as bug:
            error = PhikitError(f"a fault of phikit, not yours: {type(bug).__name__}: {bug}")
            raise
        finally:
            self.progress = self.progress._replace(phase="done", error=error)

    async def _answer(self, served: ServedModel) -> None:
        self.progress = Progress("reading")
        request = await asyncio.to_thread(self._request, served.loaded)
        parse, tokens = served.loaded.renderer.parse, list[int]()
        started = time.perf_counter()
        with served.worker.submit(request) as stream:
            is_last = False
            while not (is_last or self._is_stopped):
                is_last = stream.done
                new = [event.token for event in stream.take()]
                tokens += new
                if new:
                    self._show(parse(tokens), time.perf_counter() - started)
                if not is_last:
                    await asyncio.sleep(REFRESH_S)
            seconds = time.perf_counter() - started
            reason = stream.completions[0].finish_reason if is_last else "cancelled"
        if tokens:
            figures = {"tokens": len(tokens), "seconds": seconds, "finish_reason": reason}
            self._keep(self._reply(parse(tokens), request, **figures))

    def _show(self, message: Message, elapsed_s: float) -> None:
        was = self.progress
        has_thought = message.thinking is not None
        is_thinking = has_thought and not message.content
        thinking_s = was.thinking_s
        if is_thinking or (has_thought and thinking_s is None):
            thinking_s = elapsed_s
        phase: Phase = "thinking" if is_thinking else "saying"
        # A character may be half there.
        text, thinking = message.content.rstrip("\ufffd"), message.thinking
        self.progress = Progress(phase, text, thinking and thinking.rstrip("\ufffd"), thinking_s)

    def _request(self, loaded: LanguageModel) -> Request:
        """A request whose reply may take what the context leaves, up to the setting."""
        settings = self.settings
        request = loaded.request(
            self._question.messages,
            images=self._question.images,
            audio=self._question.clips,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
        )
        room = loaded.config.max_context - len(request.prompt)
        length = max(1, min(settings.max_new_tokens, room))
        return replace(request, max_new_tokens=length, adapter=settings.adapter)

    def _reply(self, message: Message, request: Request, **figures: Any) -> Turn:
        drawn = {key: value for key, value in asdict(self.settings).items() if value is not None}
        drawn["max_new_tokens"] = request.max_new_tokens
        if self.progress.thinking_s is not None:
            drawn["thinking_s"] = round(self.progress.thinking_s, 1)
        prompt_tokens = len(request.prompt)
        return Turn(message, self.model, settings=drawn, prompt_tokens=prompt_tokens, **figures)
