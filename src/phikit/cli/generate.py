"""`phikit generate`: one prompt, one reply; text goes on as it is, `--chat` makes it a question."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import DataError
from phikit.cli.locate import RUN_HELP, locate

if TYPE_CHECKING:
    from phikit.generate.language_model import LanguageModel, Options, Prompt
    from phikit.generate.request import Request


Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="Show an image; may be repeated. A chat."),
]
Audio = Annotated[
    list[str] | None,
    typer.Option("--audio", metavar="FILE", help="Play a clip; may be repeated. A chat."),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Longest reply, in tokens; 256, or what the context leaves."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; as stored if not given."),
]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=RUN_HELP)],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", show_default=False, help="Standard input if it is not given."
        ),
    ] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user of a chat does, not as bare text.")
    ] = False,
    images: Images = None,
    audio: Audio = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message; goes with --chat.")
    ] = None,
    max_new_tokens: NewTokens = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Draw from the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(max=1.0, metavar="P", help="Draw from the likeliest that sum up to P."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the reply.")] = 0,
    dtype: Dtype = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, at the end, and nothing else.")
    ] = False,
) -> None:
    """Continue a text, printing it as it is made."""
    from phikit.generate.language_model import load

    as_chat = as_chat or bool(images or audio)
    if system is not None and not as_chat:
        raise DataError("a system message needs a chat", fix="add --chat")
    text = _read() if prompt is None else prompt
    speaker = load(locate(model).model, dtype=dtype)
    asked: Prompt = text
    if as_chat:
        opening = [] if system is None else [{"role": "system", "content": system}]
        asked = [*opening, {"role": "user", "content": text}]
    options: Options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    request = speaker.request(
        asked, images=images or (), audio=audio or (), max_new_tokens=max_new_tokens, **options
    )
    if as_json:
        reply = speaker.answer(request, is_chat=as_chat)
        typer.echo(json.dumps(asdict(reply), ensure_ascii=False))
    else:
        _show(speaker, request, is_chat=as_chat)


def _read() -> str:
    """Standard input, without its last line break."""
    if sys.stdin.isatty():
        typer.echo("type the prompt; Ctrl-D ends it", err=True)
    # An invalid byte becomes a lone surrogate, which the tokenizer refuses by name.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore
    return sys.stdin.read().removesuffix("\n")


def _show(speaker: "LanguageModel", request: "Request", *, is_chat: bool) -> None:
    """Print the reply token by token."""
    from rich.console import Console

    from phikit.cli.conversation import ReplyView, disarmed

    stream = speaker.engine.stream(request)
    if not is_chat:
        decoder = speaker.tokenizer.decoder()
        for token in stream:
            typer.echo(disarmed(decoder.push(token)), nl=False)
        typer.echo(disarmed(decoder.flush()))
        return
    view, tokens = ReplyView(Console(highlight=False), shows_thinking=True), []
    for token in stream:
        tokens.append(token)
        view.show(speaker.renderer.parse(tokens))
    view.finish(speaker.renderer.parse(tokens))
