"""The chat page: one conversation beside the list of the others, in a browser on this machine.

Built on Gradio, which brings the chat, Markdown, mathematics, uploads and the microphone as local
files. Its telemetry, version check, share links and run history are off: with nothing but loopback
to talk to, the page works whole (`page_guard`).

What is unusual: the page keeps nothing. Handlers put what a tab asks to `Talks`, and `_watch` shows
a tab what is there, over and over while a reply is made. Settings are kept by the browser.
"""

import html
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from phikit.base.errors import MissingExtraError, PhikitError
from phikit.serve.ollama import running
from phikit.serve.page_export import to_json, to_markdown
from phikit.serve.page_guard import PageGuard
from phikit.serve.page_reply import Settings
from phikit.serve.page_talks import Choice, Talks
from phikit.serve.page_view import view

try:
    import gradio as gr  # pyright: ignore[reportMissingImports]
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, Response
    from starlette.types import ASGIApp
except ModuleNotFoundError as error:
    raise MissingExtraError("gradio", "ui") from error

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
EXAMPLES = (
    "Explain why the sky is blue in two sentences.",
    "What is 17 × 23? Think step by step.",
    "Write a Python function that reverses a string.",
    "Give me three ideas for a rainy afternoon.",
)
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
TITLE_CHARS = 60
STORED = "phikit-settings"
"""Where the browser keeps the settings."""
MAX_UPLOAD_BYTES = 64 << 20

Update = Mapping[Any, Any]
"""New values by component; the others stay as they are."""


class Page:
    """The page's components and what they do.

    Attributes:
        blocks: to be mounted.
    """

    def __init__(self, talks: Talks, *, model: str, settings: Settings) -> None:
        self.talks = talks
        self._model, self._settings = model, settings
        self._watching: dict[str, object] = {}
        with gr.Blocks(title="phikit", fill_height=True, analytics_enabled=False) as self.blocks:
            self._shown = gr.State(None)
            # The secret is none: it keeps Gradio from making a new one at every start.
            self._kept = gr.BrowserState({}, storage_key=STORED, secret=STORED)
            self._build_talks()
            self._build_chat()
            self._build_controls()
            self._wire()

    # --- What is on the page ----------------------------------------------------------------

    def _build_talks(self) -> None:
        with gr.Sidebar(position="left", width=280, elem_id="talks-panel"):
            gr.Markdown("phikit", elem_id="brand")
            self._new = gr.Button("New chat", elem_id="new", variant="primary", size="md")
            self._talks = gr.Radio(
                [], label="Conversations", show_label=False, container=False, elem_id="talks"
            )
            with gr.Column(elem_id="talk-actions", visible=False) as self._actions:
                self._links = gr.Markdown(elem_id="links")
                self._delete = gr.Button("Delete", size="sm", elem_id="delete")
                with gr.Row(visible=False, elem_id="confirm") as self._confirm:
                    self._yes = gr.Button("Delete for good", size="sm", variant="stop")
                    self._no = gr.Button("Keep", size="sm")

    def _build_chat(self) -> None:
        choice = self.talks.choices[self._model]
        with gr.Row(elem_id="head"):
            self._models = gr.Dropdown(
                list(self.talks.choices),
                value=self._model,
                label="Model",
                show_label=False,
                container=False,
                elem_id="model",
                min_width=120,
            )
            self._adapter = gr.Dropdown(
                **_adapter_choices(choice), show_label=False, container=False, elem_id="adapter"
            )
            gr.Button("◐", elem_id="theme", size="sm", scale=0, min_width=38)
        self._chat = gr.Chatbot(
            show_label=False,
            container=False,
            elem_id="chat",
            height="100%",
            scale=1,
            layout="bubble",
            editable="user",
            buttons=["copy"],
            latex_delimiters=LATEX,
            sanitize_html=True,
            allow_tags=False,
            placeholder='<div id="welcome"><h1>What would you like to know?</h1>'
            "<p>Everything stays on this machine.</p></div>",
            examples=[{"text": text} for text in EXAMPLES],
        )
        self._box = gr.MultimodalTextbox(
            show_label=False,
            container=False,
            elem_id="box",
            placeholder="Ask something",
            autofocus=True,
            max_lines=10,
            max_plain_text_length=1_000_000,
            file_count="multiple",
            **_uploads(choice),
        )

    def _build_controls(self) -> None:
        own, choice = self._settings, self.talks.choices[self._model]
        with gr.Sidebar(position="right", open=False, width=300, elem_id="controls"):
            system = gr.Textbox(own.system or "", label="System prompt", lines=3)
            temperature = gr.Slider(0, 2, own.temperature, step=0.05, label="Temperature")
            top_k = gr.Slider(0, 200, own.top_k or 0, step=1, label="Top-k (0 is off)")
            top_p = gr.Slider(0.05, 1, own.top_p or 1, step=0.01, label="Top-p (1 is off)")
            min_p = gr.Slider(0, 0.5, own.min_p or 0, step=0.01, label="Min-p (0 is off)")
            penalty = gr.Slider(
                1, 2, own.repetition_penalty, step=0.01, label="Repetition penalty (1 is off)"
            )
            length = gr.Number(own.max_new_tokens, label="Longest reply, tokens", precision=0)
            seed = gr.Number(own.seed, label="Seed", precision=0)
            self._remembers = gr.Checkbox(
                own.remembers and choice.remembers, label="Send earlier turns"
            )
        self._controls = {
            "system": system,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": penalty,
            "max_new_tokens": length,
            "seed": seed,
            "remembers": self._remembers,
            "adapter": self._adapter,
        }
        began = json.dumps([self._model, asdict(own), sorted(self._controls)])
        self._began = sha256(began.encode()).hexdigest()

    # --- What it does -----------------------------------------------------------------------

    def _wire(self) -> None:
        quiet: dict[str, Any] = {
            "api_visibility": "private",
            "show_progress": "hidden",
            "concurrency_limit": None,
            "queue": True,
        }
        asked = [self._shown, self._models, *self._controls.values()]
        watched = {
            "fn": self._watch,
            "inputs": [self._shown],
            "outputs": [self._chat, self._box, self._talks, self._links, self._actions],
            **quiet,
        }
        starts = (
            (self._box.submit, self._ask, [self._box, *asked], [self._shown, self._box]),
            (self._chat.example_select, self._ask_example, asked, [self._shown]),
            (self._chat.retry, self._ask_again, asked, []),
            (self._chat.edit, self._edit, asked, []),
            (self._new.click, lambda: None, [], [self._shown]),
            (self._talks.input, lambda id_: id_, [self._talks], [self._shown]),
            (self._yes.click, self._remove, [self._shown], [self._shown]),
            (self.blocks.load, self._open, [], [self._shown]),
        )
        for listen, function, inputs, outputs in starts:
            begun = listen(function, inputs, outputs, **quiet)
            # A refused edit must be taken off the page too, so it is shown anew in any case.
            begun.then(**watched)
        self._box.stop(self.talks.stop, [self._shown], [], **quiet)
        confirms = {"outputs": [self._delete, self._confirm], **quiet}
        self._delete.click(lambda: (gr.update(visible=False), gr.update(visible=True)), **confirms)
        for button in (self._no, self._yes):
            button.click(lambda: (gr.update(visible=True), gr.update(visible=False)), **confirms)
        self._wire_settings(quiet)
        self.blocks.unload(self._forget)

    def _wire_settings(self, quiet: dict[str, Any]) -> None:
        """A reload finds the settings as they were; so does another tab that is opened later."""
        settings = [self._models, *self._controls.values()]
        keep = {"fn": self._keep, "inputs": settings, "outputs": [self._kept], **quiet}
        controls = self._controls.values()
        # A field may tell of a key before its value has it; when it is left, it is sure to.
        left = [control.blur for control in controls if isinstance(control, gr.Textbox | gr.Number)]
        # One at a time, and of those that come meanwhile the last: none is overtaken.
        changes: list[Any] = [*(control.input for control in controls), *left]
        gr.on(changes, trigger_mode="always_last", **keep)
        self._models.input(
            self._choose, [self._models], [self._adapter, self._box, self._remembers], **quiet
        ).then(**keep)
        self.blocks.load(self._restore, [self._kept], [*settings, self._box], **quiet)

    def _keep(self, model: str, *controls: Any) -> dict[str, Any]:
        """What the browser is to remember."""
        values = dict(zip(self._controls, controls, strict=True))
        return {"began": self._began, "model": model, "values": values}

    def _restore(self, kept: dict[str, Any]) -> Update:
        """The settings as this browser had them; not those of a page begun with other ones."""
        if kept.get("began") != self._began or kept["model"] not in self.talks.choices:
            return {self._box: gr.skip()}
        choice = self.talks.choices[kept["model"]]
        updates = {self._models: kept["model"], self._box: gr.update(**_uploads(choice))}
        for name, control in self._controls.items():
            updates[control] = gr.update(value=kept["values"][name])
        chosen = kept["values"]["adapter"]
        offered = _adapter_choices(choice)
        if chosen in choice.adapters:
            offered["value"] = chosen
        return {**updates, self._adapter: gr.update(**offered)}

    async def _watch(self, id_: str | None, request: gr.Request) -> AsyncIterator[Update]:
        """Show a conversation, and go on while a reply is made; a tab watches one at a time."""
        tab = str(request.session_hash)
        self._watching[tab] = this = object()
        turns, reply = self.talks.turns(id_), self.talks.reply(id_)
        is_busy = reply is not None and not reply.done
        yield {**self._listing(id_), self._box: _buttons(is_busy=is_busy)}
        if reply is not None and is_busy:
            async for _ in reply.watch():
                if self._watching.get(tab) is not this:
                    # The last update counts as the result, so it must hold nothing.
                    yield {self._chat: gr.skip()}
                    return
                if not reply.done:
                    yield {self._chat: view(turns, reply).messages}
        yield {
            **self._listing(id_),
            self._chat: view(self.talks.turns(id_), reply).messages,
            self._box: _buttons(is_busy=False),
        }

    def _listing(self, id_: str | None) -> dict[Any, Any]:
        choices = [(_short(talk.title), talk.id) for talk in self.talks.listed()]
        # page.js reads the id from the address of a link. Without a conversation there is none.
        links = f"[Markdown](talks/{id_}.md) [JSON](talks/{id_}.json)" if id_ else "no conversation"
        return {
            self._talks: gr.update(choices=choices, value=id_),
            self._links: links,
            self._actions: gr.update(visible=id_ is not None),
        }

    def _open(self, request: gr.Request) -> str | None:
        """The conversation that the address names, if it is there."""
        id_ = request.query_params.get("c")
        return id_ if any(talk.id == id_ for talk in self.talks.listed()) else None

    async def _ask(
        self, box: dict[str, Any], id_: str | None, model: str, *controls: Any
    ) -> tuple[str, Any]:
        settings = self._read(controls)
        with _shown_errors():
            id_ = self.talks.ask(id_, box["text"], box["files"], model=model, settings=settings)
        return id_, {"text": "", "files": []}

    async def _ask_example(
        self, event: gr.SelectData, id_: str | None, model: str, *controls: Any
    ) -> str:
        settings = self._read(controls)
        with _shown_errors():
            return self.talks.ask(id_, event.value["text"], (), model=model, settings=settings)

    async def _ask_again(
        self, event: gr.RetryData, id_: str | None, model: str, *controls: Any
    ) -> None:
        settings = self._read(controls)
        with _shown_errors():
            if id_ is not None:
                number = self._turn(id_, event.index)
                self.talks.ask_again(id_, number, model=model, settings=settings)

    async def _edit(self, event: gr.EditData, id_: str | None, model: str, *controls: Any) -> None:
        settings = self._read(controls)
        with _shown_errors():
            if id_ is not None:
                number = self._turn(id_, event.index)
                self.talks.edit(id_, number, str(event.value), model=model, settings=settings)

    async def _remove(self, id_: str | None) -> None:
        with _shown_errors():
            if id_ is not None:
                self.talks.delete(id_)

    def _choose(self, model: str) -> tuple[Any, Any, bool]:
        """What follows from the choice of a model."""
        choice = self.talks.choices[model]
        remembers = self._settings.remembers and choice.remembers
        return gr.update(**_adapter_choices(choice)), gr.update(**_uploads(choice)), remembers

    def _forget(self, request: gr.Request) -> None:
        """A tab was closed; the reply that it looked at goes on."""
        self._watching.pop(str(request.session_hash), None)

    def _read(self, controls: Sequence[Any]) -> Settings:
        values = dict(zip(self._controls, controls, strict=True))
        return Settings(
            system=values["system"].strip() or None,
            temperature=float(values["temperature"]),
            top_k=int(values["top_k"]) or None,
            top_p=None if values["top_p"] >= 1 else values["top_p"],
            min_p=values["min_p"] or None,
            repetition_penalty=float(values["repetition_penalty"]),
            max_new_tokens=max(1, int(values["max_new_tokens"] or 1)),
            seed=int(values["seed"] or 0),
            remembers=values["remembers"],
            adapter=values["adapter"] or None,
        )

    def _turn(self, id_: str, index: int | tuple[int, int]) -> int:
        """The number of the turn that a message of the chat belongs to."""
        message = index if isinstance(index, int) else index[0]
        places = view(self.talks.turns(id_), self.talks.reply(id_)).places
        return places[min(message, len(places) - 1)] if places else 0


def _adapter_choices(choice: Choice) -> dict[str, Any]:
    unnamed = "Adapter by what is attached" if choice.sees or choice.hears else "No adapter"
    choices = [(unnamed, ""), *((f"Adapter: {name}", name) for name in choice.adapters)]
    return {"choices": choices, "value": "", "visible": bool(choice.adapters)}


def _uploads(choice: Choice) -> dict[str, Any]:
    """Attaching is offered for what the model can take."""
    kinds = [kind for kind, can in (("image", choice.sees), ("audio", choice.hears)) if can]
    sources = [*(["upload"] if kinds else []), *(["microphone"] if choice.hears else [])]
    # Without kinds any file would do, and be refused with a reason.
    return {"file_types": kinds or None, "sources": sources}


def _buttons(*, is_busy: bool) -> Any:
    return gr.update(submit_btn=not is_busy, stop_btn=is_busy)


def _short(title: str) -> str:
    title = title or "Attached file"
    return title if len(title) <= TITLE_CHARS else f"{title[: TITLE_CHARS - 1]}…"


@contextmanager
def _shown_errors() -> Iterator[None]:
    """What a user can act on becomes a message on the page."""
    try:
        yield
    except PhikitError as error:
        fix = "" if error.fix is None else f"<br>Next: {html.escape(error.fix)}"
        text = html.escape(error.what) + fix
        raise gr.Error(text, title="Not done", duration=12, print_exception=False) from error


def page_app(talks: Talks, *, model: str, settings: Settings) -> ASGIApp:
    """The page as an ASGI application, guarded.

    Args:
        model: the one chosen at first.
        settings: those of a new tab.
    """
    app = FastAPI(title="phikit", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/ps")
    def ps() -> dict[str, Any]:
        return running(talks.shelf)

    @app.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(SCRIPT)

    @app.get("/talks/{name}.{suffix}")
    def export(name: str, suffix: Literal["md", "json"]) -> Response:
        try:
            talk, turns = talks.history.find(name), talks.turns(name)
        except PhikitError as error:
            return PlainTextResponse(error.what, status_code=404)
        text = (to_markdown if suffix == "md" else to_json)(talk, turns)
        kind = {"md": "text/markdown", "json": "application/json"}[suffix]
        headers = {"content-disposition": f'attachment; filename="{talk.id}.{suffix}"'}
        return Response(text, media_type=kind, headers=headers)

    page = Page(talks, model=model, settings=settings)
    gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        allowed_paths=[str(talks.media)],
        max_file_size=MAX_UPLOAD_BYTES,
        theme=_theme(),
        css_paths=STYLE,
        head='<script src="page.js"></script>',
    )
    return PageGuard(app)


def _theme() -> gr.themes.Base:
    """Of local fonts alone; the semi-bold files that Gradio brings have no Latin letters."""
    sans = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    mono = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=[sans, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    )
