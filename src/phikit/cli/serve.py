"""`phikit serve`: models over HTTP, as OpenAI's and Ollama's clients ask for them."""

import ipaddress
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import ConfigError
from phikit.base.servers import announced
from phikit.cli.locate import RUN_HELP, complete_served, locate
from phikit.cli.speaker import Dtype

if TYPE_CHECKING:
    from phikit.serve.guard import Policy
    from phikit.serve.keys import Keys
    from phikit.serve.models import ModelShelf
    from phikit.serve.router import Router

GIB = 2**30

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help=f"{RUN_HELP} NAME=MODEL serves it by another name. Each is loaded when first "
        "asked for.",
        autocompletion=complete_served,
    ),
]
Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Where to listen; by default for this machine.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")]
ApiKeys = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keys, one a line, of which a client needs one; also from PHIKIT_API_KEYS.",
    ),
]
WithoutKeys = Annotated[
    bool,
    typer.Option("--without-keys", help="Listen for other machines though there are no keys."),
]
Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="URL", help="A web page that may ask; may be repeated."),
]
RemoteMedia = Annotated[
    bool,
    typer.Option("--allow-remote-media", help="Fetch images by URL, from public addresses alone."),
]
MemoryGiB = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        metavar="GIB",
        help="For all loaded models; 80% of what there is if not given.",
    ),
]
CacheGiB = Annotated[
    float, typer.Option(min=0.001, metavar="GIB", help="Keys and values, of each model.")
]
RouterFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Serve a local model and a cloud as one, by a config of docs/hybrid.md.",
    ),
]
LimitSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=VALUE", help="A bound of docs/server.md; may be repeated."
    ),
]


def serve(
    models: Models,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_keys: ApiKeys = None,
    without_keys: WithoutKeys = False,
    origins: Origins = None,
    remote_media: RemoteMedia = False,
    memory_gib: MemoryGiB = None,
    cache_gib: CacheGiB = 1.0,
    dtype: Dtype = None,
    router: RouterFile = None,
    limits: LimitSettings = None,
) -> None:
    """Serve models over HTTP until told to stop (Ctrl-C)."""
    from phikit.serve import server
    from phikit.serve.app import make_app
    from phikit.serve.keys import read_keys
    from phikit.serve.limits import Limits
    from phikit.serve.media import Fetcher

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    bounds = Limits.resolve({}, limits or [])
    keys = read_keys(api_keys)
    policy = _policy(host, keys, origins or [], without_keys=without_keys)
    budget = None if memory_gib is None else int(memory_gib * GIB)
    shelf = _shelf(models, dtype, budget, int(cache_gib * GIB), bounds.max_queue)
    fetcher = Fetcher(remote_media, bounds.max_body_bytes)
    hybrid = None if router is None else _router(router, shelf)
    app = make_app(shelf, policy=policy, limits=bounds, fetcher=fetcher, router=hybrid)
    listener = server.listen(host, port)
    place = f"{host}:{listener.getsockname()[1]}"
    text = f"{', '.join(shelf.names)} on http://{place}/v1 (OpenAI) and http://{place} (Ollama)"
    try:
        with announced(f"http://{place}", shelf.names):
            server.serve(app, bounds, listener, ready=lambda: typer.echo(text))
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)


def _policy(host: str, keys: "Keys", origins: list[str], *, without_keys: bool) -> "Policy":
    """Who may ask; other machines only with a key, or where the user insists.

    Raises ConfigError otherwise.
    """
    from phikit.serve.guard import LOCAL_HOSTS, Policy

    if _is_loopback(host):
        return Policy(keys, LOCAL_HOSTS | {host.lower()}, origins)
    if not keys and not without_keys:
        raise ConfigError(
            f"{host} is open to other machines, and there are no API keys",
            fix="give --api-keys FILE, or insist with --without-keys",
        )
    if not keys:
        typer.echo(f"phikit: anybody who reaches {host} can use these models", err=True)
    return Policy(keys, None, origins)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _shelf(
    models: list[str], dtype: str | None, memory_bytes: int | None, cache_bytes: int, max_queue: int
) -> "ModelShelf":
    from phikit.generate.engine import Engine
    from phikit.serve.models import ModelShelf, source

    sources = {}
    for each in models:
        name, is_named, path = each.partition("=")
        if not is_named or Path(each).exists():
            path, name = each, Path(each).resolve().name if Path(each).exists() else each
        if name in sources:
            raise ConfigError(f"two models are called {name!r}", fix="name one: NAME=MODEL")
        sources[name] = source(locate(path).model, dtype=dtype)
    return ModelShelf(
        sources,
        memory_bytes=memory_bytes,
        make_engine=lambda loaded: Engine(loaded.model, cache_bytes=cache_bytes),
        max_queue=max_queue,
    )


def _router(path: Path, shelf: "ModelShelf") -> "Router":
    """The router of a config; its local side is one of the models that are served."""
    from phikit.serve.hybrid import ShelfChat, open_router, read_router_config

    config = read_router_config(path)
    if config.name in shelf.names:
        raise ConfigError(
            f"a model and the router are both called {config.name!r}", fix="set name in its config"
        )
    if config.local in shelf.names:
        return open_router(config, ShelfChat(shelf, config.local))
    typer.echo(
        f"phikit: {config.local!r} is not served, so {config.name!r} is the cloud alone", err=True
    )
    return open_router(config, None)
