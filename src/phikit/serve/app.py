"""The HTTP application: paths, what they take and give, and the OpenAPI document that says so.

The document is held to be true: unknown fields are refused, the errors are the shapes it names, and
what is under `/api/` is Ollama's.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import phikit
from phikit.base.errors import MissingExtraError
from phikit.serve import ollama, openai
from phikit.serve import ollama_schema as ollama_wire
from phikit.serve import openai_schema as wire
from phikit.serve.errors import UnknownModelError
from phikit.serve.faults import ErrorBody, Fault, OllamaErrorBody, encode, fault_of
from phikit.serve.guard import EXITS, App, Guard, Policy
from phikit.serve.jobs import Service, unless_gone
from phikit.serve.limits import Limits
from phikit.serve.media import Fetcher
from phikit.serve.metrics import Metrics
from phikit.serve.models import ModelShelf
from phikit.serve.openai_ask import chat_asker, embedding_inputs, read_talk, text_asker
from phikit.serve.openai_routed import RoutedChats
from phikit.serve.router import Router

if TYPE_CHECKING:
    from fastapi import FastAPI

ERRORS = {
    400: "What is asked for makes no sense, or cannot be done.",
    401: "No valid API key.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests; Retry-After says when to ask again.",
    503: "The server is shutting down, or the model cannot be loaded.",
    504: "The reply took too long.",
}

MESSAGE_CHARS = 500
"""Of what a request is told about itself."""


def make_app(
    shelf: ModelShelf,
    *,
    policy: Policy | None = None,
    limits: Limits | None = None,
    fetcher: Fetcher | None = None,
    router: Router | None = None,
) -> App:
    """The application, guarded. It closes the shelf when the server stops.

    Args:
        router: answers chats that ask for its name as their model.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    policy, limits = policy or Policy(), limits or Limits()
    service = Service(shelf, limits, Metrics(shelf))
    routed = None if router is None else RoutedChats(router)
    inner = _inner(service, fetcher or Fetcher(), routed)
    paths = {route.path for route in inner.routes}  # pyright: ignore[reportAttributeAccessIssue]
    guarded = Guard(inner, policy, limits, service.metrics, paths=paths)
    if not policy.origins:
        return guarded
    from fastapi.middleware.cors import CORSMiddleware

    return CORSMiddleware(  # pyright: ignore[reportReturnType]
        guarded,  # pyright: ignore[reportArgumentType]
        allow_origins=list(policy.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _inner(service: Service, fetcher: Fetcher, routed: RoutedChats | None) -> "FastAPI":
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise MissingExtraError("fastapi", "serve") from error

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.shelf.close()

    app = FastAPI(
        title="phikit",
        version=phikit.__version__,
        description="Small language models as OpenAI's and Ollama's clients ask for them.",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A path with a slash too many is unknown; a redirect would drop the key.
        redirect_slashes=False,
    )
    _add_faults(app)
    _add_state(app, service)
    _add_models(app, service.shelf, routed)
    _add_openai(app, service, fetcher, routed)
    _add_ollama(app, service)
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            # What fastapi says by itself of bodies that do not fit; here they are 400.
            operation["responses"].pop("422", None)
    return app


def _add_faults(app: "FastAPI") -> None:
    """Every error in the shape of the path's clients."""
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    from phikit.base.errors import PhikitError

    def answer(request: Request, fault: Fault) -> Response:
        body = fault.body(request.url.path)
        return Response(body, fault.status, fault.headers, "application/json")

    @app.exception_handler(PhikitError)
    async def known(request: Request, error: PhikitError) -> Response:
        return answer(request, fault_of(error))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return answer(request, fault_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _invalid(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        made = answer(request, Fault(error.status_code, str(error.detail)))
        made.headers.update(error.headers or {})
        return made


def _invalid(errors: Sequence[Any], body: Any) -> Fault:
    """The fault of a body that lies deepest, by the name of its field.

    Where several shapes are allowed, each that does not fit complains; the one that fits best does
    so furthest inside.
    """
    found = [(_field(error, body), error) for error in errors]
    places, error = max(found, key=lambda pair: len(pair[0]))
    param = ".".join(map(str, places)) or None
    match error["type"]:
        case "extra_forbidden":
            message = f"{param} is no field that this server knows"
        case "json_invalid":
            param, message = None, f"the body is not JSON: {error.get('ctx', {}).get('error', '')}"
        case _:
            message = f"{param or 'the body'}: {error['msg']}"
    return Fault(400, message[:MESSAGE_CHARS], param=param and param[:MESSAGE_CHARS])


def _field(error: Any, body: Any) -> list[str | int]:
    """Where in the body an error is; pydantic's names for the shapes it tried are left out."""
    places: list[str | int] = []
    loc = [part for part in error["loc"] if part != "body"]
    for part in loc:
        is_key = isinstance(body, dict) and (part in body or error["type"] == "missing")
        if is_key or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            places.append(part)
            body = body.get(part) if isinstance(body, dict) else body[part]
    tag = error.get("ctx", {}).get("discriminator", "")
    return [*places, tag.strip("'")] if tag else places


def _add_state(app: "FastAPI", service: Service) -> None:
    from fastapi import Response

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """Whether the server answers; needs no key."""
        return {"status": "ok"}

    @app.get(
        "/metrics",
        tags=["state"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors()},
    )
    def metrics() -> Response:
        """Counters as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_models(app: "FastAPI", shelf: ModelShelf, routed: RoutedChats | None) -> None:
    from fastapi import Response

    @app.get("/v1/models", responses=_openai(wire.ModelList), tags=["OpenAI"])
    async def models() -> Response:
        """The models by name."""
        made = openai.model_list(shelf)
        if routed is not None:
            made["data"].append(routed.entry())
        return _json(made)

    @app.get("/v1/models/{name:path}", responses=_openai(wire.ModelEntry), tags=["OpenAI"])
    async def model(name: str) -> Response:
        """One model."""
        if routed is not None and name == routed.router.config.name:
            return _json(routed.entry())
        if name not in shelf.sources:
            raise UnknownModelError(f"there is no model {name!r} here")
        return _json(openai.model_entry(shelf, name))


def _add_openai(
    app: "FastAPI", service: Service, fetcher: Fetcher, routed: RoutedChats | None
) -> None:
    from fastapi import Request, Response

    @app.post(
        "/v1/chat/completions",
        responses=_openai(wire.ChatCompletion, streams=True),
        tags=["OpenAI"],
    )
    async def chat(body: wire.ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream`, in server-sent events."""
        talk = await read_talk(body.messages, fetcher, service.limits)
        if routed is not None and body.model == routed.router.config.name:
            alone = routed.local_for(body, talk)
            if alone is None and body.stream:
                return _stream(openai.as_events(routed.events(body, talk)), "text/event-stream")
            if alone is None:
                return _json(await unless_gone(request.receive, routed.whole(body, talk)))
            body = body.model_copy(update={"model": alone})
        job = await service.start(
            _exits(request),
            body.model,
            chat_asker(body, talk, service.limits),
            has_media=bool(talk.images or talk.audio),
        )
        if body.stream:
            return _stream(openai.as_events(openai.chat_events(job, body)), "text/event-stream")
        return _json(await unless_gone(request.receive, openai.chat_whole(job, body)))

    @app.post(
        "/v1/completions", responses=_openai(wire.TextCompletion, streams=True), tags=["OpenAI"]
    )
    async def text(body: wire.CompletionRequest, request: Request) -> Response:
        """Go on with a text; with `stream`, in server-sent events."""
        job = await service.start(_exits(request), body.model, text_asker(body, service.limits))
        if body.stream:
            return _stream(openai.as_events(openai.text_events(job, body)), "text/event-stream")
        return _json(await unless_gone(request.receive, openai.text_whole(job, body)))

    @app.post("/v1/embeddings", responses=_openai(wire.EmbeddingList), tags=["OpenAI"])
    async def embed(body: wire.EmbeddingRequest, request: Request) -> Response:
        """Mean-pooled final hidden states of length 1."""
        inputs = embedding_inputs(body, service.limits)
        exits = _exits(request)
        exits.enter_context(service.place("for embeddings", service.limits.max_queue))
        served = await service.model(exits, body.model)
        made = openai.embeddings(served, body, inputs, service.limits)
        return _json(await unless_gone(request.receive, made))


def _add_ollama(app: "FastAPI", service: Service) -> None:
    from fastapi import Request, Response

    shelf = service.shelf

    @app.get("/api/version", responses=_ollama(ollama_wire.Version), tags=["Ollama"])
    async def version() -> Response:
        """Of this server."""
        return _json({"version": phikit.__version__})

    @app.get("/api/tags", responses=_ollama(ollama_wire.Tags), tags=["Ollama"])
    async def tags() -> Response:
        """The models by name."""
        return _json(ollama.tags(shelf))

    @app.get("/api/ps", responses=_ollama(ollama_wire.Running), tags=["Ollama"])
    async def running() -> Response:
        """The models in memory."""
        return _json(ollama.running(shelf))

    @app.post("/api/show", responses=_ollama(ollama_wire.Shown), tags=["Ollama"])
    async def show(body: ollama_wire.ShowRequest) -> Response:
        """One model, without loading it."""
        return _json(ollama.show(shelf, body))

    async def answer(
        request: Request, body: ollama_wire.Drawing, asker: Callable, render: type[ollama.Replies]
    ) -> Response:
        if ollama.is_load(body):
            served = await service.model(_exits(request), body.model)
            return _json(render.loaded(body, served))
        job = await service.start(
            _exits(request),
            body.model,
            asker(body, service.limits),
            has_media=ollama.has_media(body),
        )
        replies = render(job, body)
        if body.stream is not False:
            return _stream(ollama.as_lines(replies.pieces()), "application/x-ndjson")
        return _json(await unless_gone(request.receive, replies.whole()))

    @app.post("/api/chat", responses=_ollama(ollama_wire.ChatReply, streams=True), tags=["Ollama"])
    async def chat(body: ollama_wire.ChatRequest, request: Request) -> Response:
        """Answer a conversation; a JSON object a line unless `stream` is false."""
        return await answer(request, body, ollama.chat_asker, ollama.ChatReplies)

    @app.post(
        "/api/generate", responses=_ollama(ollama_wire.GenerateReply, streams=True), tags=["Ollama"]
    )
    async def generate(body: ollama_wire.GenerateRequest, request: Request) -> Response:
        """Answer a prompt, or go on with it if `raw`; a JSON object a line as above."""
        return await answer(request, body, ollama.generate_asker, ollama.GenerateReplies)


def _exits(request: Any) -> AsyncExitStack:
    return request.scope[EXITS]


def _json(value: Any) -> Any:
    from fastapi import Response

    return Response(encode(value), media_type="application/json")


def _stream(lines: AsyncIterator[bytes], media_type: str) -> Any:
    from fastapi.responses import StreamingResponse

    # Proxies such as nginx would hold the lines back until there are many.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type=media_type, headers=headers)


def _errors(body: type = ErrorBody) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": body, "description": text} for status, text in ERRORS.items()}


def _openai(model: type, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    # OpenAPI 3.1 has no words for the events of a stream, and some read a schema as that of each.
    content = {"content": {"text/event-stream": {}}} if streams else {}
    return {200: {"model": model, **content}, **_errors()}


def _ollama(model: type, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    lines = {"application/x-ndjson": {"schema": {"type": "string"}}}
    content = {"content": lines} if streams else {}
    return {200: {"model": model, **content}, **_errors(OllamaErrorBody)}
