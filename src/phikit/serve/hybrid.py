"""A router made from its config: read from a file, its local side on the server's shelf."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phikit.chat.message import Message
from phikit.generate.chat import Chat, ChatOptions, ChatReply, LocalChat
from phikit.generate.remote import Remote
from phikit.generate.reply import Piece
from phikit.serve.budget import Budget, Metered
from phikit.serve.models import ModelShelf
from phikit.serve.router import Router, RouterConfig, Score


def read_router_config(path: Path) -> RouterConfig:
    """The config in a `.toml` or `.json` file.

    Raises:
        ConfigError: the file cannot be read, or its settings cannot be used.
    """
    return RouterConfig.read(path, fix="see docs/hybrid.md")


def open_cloud(config: RouterConfig) -> Metered | None:
    """The config's cloud, which spends from its budget; None if it names none.

    Raises:
        ConfigError: the key's environment variable is not set.
        StorageError: the budget cannot be kept.
    """
    return None if config.cloud is None else Metered(Remote(config.cloud), Budget(config.budget))


def open_router(config: RouterConfig, local: Chat | None, *, score: Score | None = None) -> Router:
    """A router with the config's cloud; for the arguments see `Router`.

    Raises:
        ConfigError: as `open_cloud`, or the signal needs a scorer.
        StorageError: as `open_cloud`, or the log cannot be written.
    """
    return Router(config, local=local, cloud=open_cloud(config), score=score)


class ShelfChat:
    """A model of a server as a `Chat`: loaded when asked, in use while it answers."""

    def __init__(self, shelf: ModelShelf, name: str) -> None:
        self._shelf, self._name = shelf, name

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        """See `Chat.answer`; raises UnknownModelError too, and what loading may raise."""
        with self._model() as model:
            return model.answer(messages, options)

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        """See `Chat.stream`; raises as `answer`."""
        with self._model() as model:
            yield from model.stream(messages, options)

    @contextmanager
    def _model(self) -> Iterator[LocalChat]:
        with self._shelf.acquire(self._name) as served:
            yield LocalChat(served.loaded, start=served.worker.submit)
