"""A server in a thread of this process, and what tests ask of it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from phikit.chat.tokenizer import Tokenizer, train_tokenizer
from phikit.generate.engine import Engine
from phikit.generate.language_model import LanguageModel
from phikit.serve import server
from phikit.serve.app import make_app
from phikit.serve.guard import Policy
from phikit.serve.limits import Limits
from phikit.serve.media import Fetcher
from phikit.serve.models import ModelShelf, Source
from phikit.serve.router import Router

SPECIALS = (
    *("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
    *("<|endoftext10|>", "<|endoftext11|>"),
)
WORDS = (
    'What is 12 + 7? The answer is 19, {"name": "add", "arguments": {"a": 12, "b": 7}}\n',
    "Anna has three apples and buys four more. How many apples does she have?\n\n",
    "You are a helpful assistant. Hello there, how are you today? [1, 2, 3] true false\n",
)


class House(NamedTuple):
    """A running server and what is behind it."""

    url: str
    shelf: ModelShelf
    loaded: LanguageModel
    """The model called "tiny"."""

    @property
    def engine(self) -> Engine:
        [model] = [model for model in self.shelf.loaded if model.name == "tiny"]
        return model.worker.engine

    def rests(self, timeout_s: float = 10.0) -> bool:
        """Whether, soon, nothing runs and nobody holds a block."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            idle = all(
                model.worker.idle
                and model.worker.engine.pool.available == model.worker.engine.pool.size
                for model in self.shelf.loaded
            )
            if idle and not any(model.users for model in self.shelf.loaded):
                return True
            time.sleep(0.02)
        return False


def at_hand(loaded: LanguageModel, size: int = 0) -> Source:
    """A model that is loaded already."""
    return Source(
        lambda: loaded, lambda: size, {"config": loaded.config, "senses": (*loaded.model.senses,)}
    )


@contextmanager
def running(
    shelf: ModelShelf,
    *,
    limits: Limits | None = None,
    policy: Policy | None = None,
    fetcher: Fetcher | None = None,
    router: Router | None = None,
) -> Iterator[str]:
    """The URL of a server for the shelf, which stops with the context."""
    limits = limits or Limits(shutdown_s=1)
    app = make_app(shelf, policy=policy, limits=limits, fetcher=fetcher, router=router)
    uvicorn_server = server.make_server(app, limits)
    listener = server.listen("127.0.0.1", 0)
    thread = threading.Thread(
        target=lambda: asyncio.run(uvicorn_server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def small_engine(loaded: LanguageModel) -> Engine:
    return Engine(loaded.model, cache_bytes=64 << 20, max_rows=128)


def make_tool_tokenizer() -> Tokenizer:
    """A small tokenizer with the special tokens of Phi-4-multimodal."""
    return train_tokenizer(WORDS, size=310, specials=SPECIALS)
