"""`phikit chat --web`: the chat page, with all models that `phikit ls` lists, on this machine."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import ConfigError, PhikitError
from phikit.base.servers import announced
from phikit.cli.locate import locate
from phikit.cli.manage import entries

if TYPE_CHECKING:
    from phikit.chat.history import History
    from phikit.generate.language_model import LanguageModel
    from phikit.serve.models import ModelShelf, Source
    from phikit.serve.page_talks import Choice

RUNS = Path("runs")
MAX_ROWS = 16
"""Replies at once, of all tabs."""
CACHE_BYTES = 1 << 30
PORT = 7860
DRAWING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "system", "seed"),
)
"""What becomes the settings of a new tab."""
TERMINAL = {
    "images": "--image",
    "audio": "--audio",
    "stop": "--stop",
    "draft": "--draft",
    "lookup": "--lookup",
    "cache": "--cache",
}
"""What the page has no use for."""

Web = Annotated[
    bool, typer.Option("--web", help="A page for the browser in place of the terminal.")
]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="N", help="Of the page; 7860, and 0 takes a free one."),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="FOLDER", help="Offer an adapter of RUN on the page."),
]


def chat_web(given: Mapping[str, Any]) -> None:
    """Serve the page until told to stop (Ctrl-C).

    Args:
        given: the parameters of `phikit chat`.

    Raises:
        ConfigError: an option of the terminal is given with --web, or one of the page without.
    """
    if not given["web"]:
        raise ConfigError("--port and --adapter are for the page", fix="add --web")
    idle = [option for name, option in TERMINAL.items() if given[name]]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)}: not with --web", fix="leave it out, or leave out --web"
        )
    _serve(
        given["run"],
        {name: given[name] for name in DRAWING},
        port=PORT if given["port"] is None else given["port"],
        adapters=given["adapters"] or (),
        dtype=given["dtype"],
        keeps=not given["no_history"],
    )


def _serve(
    run: str,
    drawing: Mapping[str, Any],
    *,
    port: int,
    adapters: Sequence[Path],
    dtype: str | None,
    keeps: bool,
) -> None:
    from phikit.generate.engine import Engine
    from phikit.serve import server
    from phikit.serve.limits import Limits
    from phikit.serve.models import ModelShelf
    from phikit.serve.page import page_app
    from phikit.serve.page_reply import Settings
    from phikit.serve.page_talks import Talks

    named = {folder.resolve().name: folder for folder in adapters}
    if len(named) < len(adapters):
        raise ConfigError("two adapters have the same name", fix="rename one of the folders")
    sources, choices = _offered(run, dtype, named)
    shelf = ModelShelf(
        sources,
        make_engine=lambda loaded: Engine(loaded.model, max_rows=MAX_ROWS, cache_bytes=CACHE_BYTES),
    )
    listener = server.listen("127.0.0.1", port)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def ready() -> None:
        typer.echo(f"{run}: open {url}/ in a browser; Ctrl-C ends")
        threading.Thread(target=_load, args=(shelf, run), daemon=True).start()

    with _folders(keeps=keeps) as (history, media):
        talks = Talks(shelf, choices, history=history, media=media)
        app = page_app(talks, model=run, settings=Settings(**drawing))
        with suppress(KeyboardInterrupt), announced(url, shelf.names):
            server.serve(app, Limits(shutdown_s=1), listener, ready=ready)
        shelf.close()


def _offered(
    run: str, dtype: str | None, adapters: dict[str, Path]
) -> "tuple[dict[str, Source], list[Choice]]":
    """The model asked for, then the others on this machine that can be run."""
    from phikit.serve.models import source

    first = source(locate(run).model, dtype=dtype)
    sources = {run: _with_adapters(first, adapters) if adapters else first}
    for entry in entries(RUNS):
        if entry.note is None and entry.name not in sources:
            with suppress(PhikitError):
                found = source(locate(entry.name).model)
                if found.about["path"] != first.about["path"]:
                    sources[entry.name] = found
    own = {run: tuple(adapters)}
    return sources, [_choice(name, sources[name], own.get(name, ())) for name in sources]


def _choice(name: str, source: "Source", adapters: tuple[str, ...]) -> "Choice":
    from phikit.base.media import SPEECH, VISION
    from phikit.serve.page_talks import Choice

    about = source.about
    # The recipes train on single questions; a second turn is outside of what they saw.
    return Choice(
        name,
        sees=VISION in about["senses"],
        hears=SPEECH in about["senses"],
        adapters=(*about["adapters"], *adapters),
        remembers=locate(name).stage is None,
    )


def _with_adapters(source: "Source", folders: dict[str, Path]) -> "Source":
    from phikit.nn.lora import choose_adapter
    from phikit.weights.adapter import load_adapter

    def load() -> "LanguageModel":
        loaded = source.load()
        for name, folder in folders.items():
            load_adapter(folder, loaded.model, name=name)
        choose_adapter(loaded.model, None)  # a question names the one it wants
        return loaded

    return source._replace(load=load)


@contextmanager
def _folders(*, keeps: bool) -> "Iterator[tuple[History, Path]]":
    """Where conversations and their attached files are kept; uploads go when the server ends."""
    from phikit.base.places import data_folder
    from phikit.chat.history import History, Recorder

    with TemporaryDirectory(prefix="phikit-page-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(scratch) / "uploads")
        # The recorder knows who may say that nothing is to be kept.
        is_on = Recorder(model="", source="page", warn=typer.echo, is_on=keeps).is_on
        folder = data_folder() if is_on else Path(scratch)
        history = History(folder / "history.sqlite3")
        try:
            yield history, folder / "media"
        finally:
            history.close()


def _load(shelf: "ModelShelf", name: str) -> None:
    """Load the first model, so that the first question need not wait; it says what is wrong."""
    with suppress(PhikitError), shelf.acquire(name):
        pass
