"""`phikit generate`: one prompt, one reply; text goes on as it is, `--chat` makes it a question."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import DataError
from phikit.cli.locate import RUN_HELP, complete_model
from phikit.cli.speaker import Cache, Draft, Dtype, Lookup, NoHistory, open_speaker

if TYPE_CHECKING:
    from phikit.chat.history import Turn
    from phikit.chat.message import Message
    from phikit.generate.language_model import LanguageModel, Options
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
TopK = Annotated[
    int | None, typer.Option(min=1, metavar="K", help="Draw from the K likeliest tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(max=1.0, metavar="P", help="Draw from the likeliest that sum up to P."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="P",
        help="Draw from those at least P times as likely as the best.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(metavar="X", help="Above 1, what has been said becomes less likely; try 1.1."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the reply before this text; may be repeated."),
]
Schema = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="The reply is JSON that fits the JSON schema in this file."),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN", help="The reply matches this from end to end, as in: [0-9]+ apples"
    ),
]
LogProbs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="With --json: the log-probability of each token, and of the N likeliest in its place.",
    ),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system message; goes with --chat.")
]
Text = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", show_default=False, help="Standard input if it is not given, or a dash."
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")
]


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=RUN_HELP, autocompletion=complete_model)
]
AsChat = Annotated[
    bool, typer.Option("--chat", help="Ask it as a user of a chat does, not as bare text.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the reply.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, at the end, and nothing else.")
]


def generate(
    model: Model,
    prompt: Text = None,
    as_chat: AsChat = False,
    images: Images = None,
    audio: Audio = None,
    system: System = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    schema: Schema = None,
    regex: Regex = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    draft: Draft = None,
    lookup: Lookup = False,
    cache: Cache = None,
    log_probs: LogProbs = None,
    as_json: AsJson = False,
    no_history: NoHistory = False,
) -> None:
    """Continue a text, printing it as it is made; with --chat, an image or a clip, answer it.

    From a pipe: `cat question.txt | phikit generate MODEL --chat`. What was said is kept for
    `phikit history`.
    """
    as_chat = as_chat or bool(images or audio)
    if system is not None and not as_chat:
        raise DataError("a system message needs a chat", fix="add --chat")
    if log_probs is not None and not as_json:
        raise DataError("--log-probs are a part of the JSON", fix="add --json")
    options: Options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "schema": None if schema is None else _read_schema(schema),
        "regex": regex,
        "top_log_probs": log_probs or 0,
    }
    asked = _asked(_read() if prompt in (None, "-") else prompt, system)
    speaker = open_speaker(model, dtype=dtype, draft=draft, lookup=lookup, cache=cache)
    request = speaker.request(
        asked if as_chat else asked[-1].content,
        images=images or (),
        audio=audio or (),
        max_new_tokens=max_new_tokens,
        **options,
    )
    if as_json:
        turn = _print_json(speaker, request, is_chat=as_chat, with_log_probs=log_probs is not None)
    else:
        turn = _print_stream(speaker, request, is_chat=as_chat)
    if not no_history:
        settings = {name: value for name, value in options.items() if name != "schema"}
        _keep(model, asked, replace(turn, settings=settings), images or (), audio or ())


def _asked(text: str, system: str | None) -> "list[Message]":
    from phikit.chat.message import Message

    opening = [] if system is None else [Message("system", system)]
    return [*opening, Message("user", text)]


def _read() -> str:
    """Standard input, without its last line break."""
    if sys.stdin.isatty():
        typer.echo("type the prompt; Ctrl-D ends it", err=True)
    # An invalid byte becomes a lone surrogate, which the tokenizer refuses by name.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore
    return sys.stdin.read().removesuffix("\n")


def _read_schema(file: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise DataError(f"{file} holds no JSON object", fix='begin with {"type": "object", ...}')
    return schema


def _print_json(
    speaker: "LanguageModel", request: "Request", *, is_chat: bool, with_log_probs: bool
) -> "Turn":
    """Print the reply as one JSON object."""
    from phikit.chat.history import Turn
    from phikit.chat.message import Message

    started = time.perf_counter()
    reply = speaker.answer(request, is_chat=is_chat)
    seconds = time.perf_counter() - started
    record = {
        "text": reply.text,
        "thinking": reply.thinking,
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "reply_tokens": len(reply.tokens),
        "seconds": round(seconds, 3),
    }
    if with_log_probs:
        record |= {"log_probs": reply.log_probs, "top_log_probs": reply.top_log_probs}
    typer.echo(json.dumps(record, ensure_ascii=False))
    return Turn(
        Message("assistant", reply.text, reply.thinking),
        model="",
        prompt_tokens=reply.prompt_tokens,
        tokens=len(reply.tokens),
        seconds=seconds,
        finish_reason=reply.finish_reason,
    )


def _print_stream(speaker: "LanguageModel", request: "Request", *, is_chat: bool) -> "Turn":
    """Print the reply as it is made."""
    from rich.console import Console

    from phikit.chat.history import Turn
    from phikit.chat.message import Message
    from phikit.cli.conversation import ReplyView, disarmed
    from phikit.generate.language_model import cut_message, stop_strings

    started, prompt_tokens = time.perf_counter(), len(request.prompt)
    if not is_chat:
        pieces = []
        for piece in speaker.pieces(request, is_chat=False):
            pieces.append(piece)
            typer.echo(disarmed(piece), nl=False)
        typer.echo()
        said, tokens = Message("assistant", "".join(pieces)), None
    else:
        stop, ids = stop_strings(request), []
        view = ReplyView(Console(highlight=False), shows_thinking=True, stop=stop)
        for token in speaker.engine.stream(request):
            ids.append(token)
            view.show(speaker.renderer.parse(ids))
        said, tokens = cut_message(speaker.renderer.parse(ids), stop), len(ids)
        view.finish(said)
    seconds = time.perf_counter() - started
    return Turn(said, model="", prompt_tokens=prompt_tokens, tokens=tokens, seconds=seconds)


def _keep(
    model: str,
    asked: "list[Message]",
    reply: "Turn",
    images: Sequence[str],
    audio: Sequence[str],
) -> None:
    """Write question and reply into the history."""
    from phikit.chat.history import Medium, Recorder, Turn

    media = []
    for kind, paths in (("image", images), ("audio", audio)):
        with suppress(OSError):  # removed meanwhile
            media += [Medium.of(kind, path) for path in paths]
    *opening, question = (Turn(message, model) for message in asked)
    recorder = Recorder(
        model=model, source="generate", warn=lambda what: typer.echo(f"phikit: {what}", err=True)
    )
    recorder.record(*opening, replace(question, media=tuple(media)), replace(reply, model=model))
    recorder.close()
