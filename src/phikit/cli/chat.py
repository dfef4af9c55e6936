"""`phikit chat`: a conversation at a terminal, or questions from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import PhikitError
from phikit.cli.chat_web import Adapters, Port, Web, chat_web
from phikit.cli.generate import MinP, RepetitionPenalty, Stop, TopK, TopP
from phikit.cli.lines import Interrupts, line_editing, piped, typed
from phikit.cli.locate import RUN_HELP, complete_model, locate
from phikit.cli.speaker import Cache, Draft, Dtype, Lookup, NoHistory, open_speaker

if TYPE_CHECKING:
    from phikit.cli.conversation import Conversation
    from phikit.generate.language_model import LanguageModel

Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="Show an image with the first question."),
]
Audio = Annotated[
    list[str] | None,
    typer.Option("--audio", metavar="FILE", help="Play a clip with the first question."),
]


def chat(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_model)
    ],
    images: Images = None,
    audio: Audio = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")
    ] = 0.6,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest reply, in tokens.")
    ] = 512,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the replies.")] = 0,
    dtype: Dtype = None,
    draft: Draft = None,
    lookup: Lookup = False,
    cache: Cache = None,
    no_history: NoHistory = False,
    web: Web = False,
    port: Port = None,
    adapters: Adapters = None,
) -> None:
    """Talk to a model. From a pipe, every line is a question by itself.

    A line that ends in a backslash goes on in the next one; lines between two \"\"\" are one
    question. /help lists the commands: show an image, take a question back, ask it again, change
    the model. Ctrl-C stops a reply, twice in quick succession leaves.

    What is said is kept for `phikit history`.
    """
    if web or port is not None or adapters:
        chat_web(context.params)
        return
    from phikit.chat.history import Recorder
    from phikit.cli.conversation import Conversation, Settings

    def opened(name: str) -> "LanguageModel":
        guesser = draft if name == run else None
        return open_speaker(name, dtype=dtype, draft=guesser, lookup=lookup, cache=cache)

    others = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "stop": stop or ()}
    settings = Settings(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        system=system,
        seed=seed,
        others={**others, "repetition_penalty": repetition_penalty},  # pyright: ignore
        # The recipes train on single questions; a second turn is outside of what they saw.
        remembers=locate(run).stage is None and sys.stdin.isatty(),
    )
    recorder = Recorder(model=run, source="chat", warn=_warn, is_on=not no_history)
    conversation = Conversation(opened(run), settings, recorder=recorder, load=opened)
    conversation.show(images=images or (), audio=audio or ())
    try:
        _hold(conversation, keeps_lines=recorder.is_on)
    finally:
        recorder.close()


def _hold(conversation: "Conversation", *, keeps_lines: bool) -> None:
    """Take inputs to their end."""
    interrupts = Interrupts()
    if not sys.stdin.isatty():
        if not _talk(conversation, piped(), interrupts):
            raise typer.Exit(1)
        return
    conversation.greet()
    # A Ctrl-C while another is being dealt with is the second of two quick ones.
    with line_editing(conversation.commands, keeps=keeps_lines), suppress(KeyboardInterrupt):
        _talk(conversation, typed(interrupts), interrupts)


def _talk(conversation: "Conversation", inputs: Iterator[str], interrupts: Interrupts) -> bool:
    """Take inputs to the end; a question that fails does not stop the others. Did all go well?"""
    went_well = True
    for text in inputs:
        try:
            if not conversation.take(text):
                break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            is_second = interrupts.again()
            typer.echo("(stopped)")
            if is_second:
                break
        except PhikitError as error:
            typer.echo(f"phikit: {error}", err=True)
            went_well = False
    return went_well


def _warn(message: str) -> None:
    typer.echo(f"phikit: {message}", err=True)
