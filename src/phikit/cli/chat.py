"""`phikit chat`: a conversation at a terminal, or questions from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import PhikitError
from phikit.cli.locate import RUN_HELP, locate

if TYPE_CHECKING:
    from phikit.cli.conversation import Conversation


def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")
    ] = 0.6,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest reply, in tokens.")
    ] = 512,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the replies.")] = 0,
) -> None:
    """Talk to a model. From a pipe, every line is a question by itself."""
    from phikit.cli.conversation import Conversation, Settings
    from phikit.weights.load import load

    place = locate(run)
    loaded = load(place.model)
    settings = Settings(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        system=system,
        seed=seed,
        # The recipes train on single questions; a second turn is outside of what they saw.
        remembers=place.stage is None and sys.stdin.isatty(),
    )
    conversation = Conversation(loaded, settings)
    if sys.stdin.isatty():
        conversation.greet()
        _talk(conversation, _typed())
    elif not _talk(conversation, _piped()):
        raise typer.Exit(1)


def _talk(conversation: "Conversation", lines: Iterator[str]) -> bool:
    """Take lines to the end; a question that fails does not stop the others. Did all go well?"""
    went_well = True
    for line in lines:
        try:
            if not conversation.take(line):
                break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            typer.echo("(stopped)")
        except PhikitError as error:
            typer.echo(f"phikit: {error}", err=True)
            went_well = False
    return went_well


def _typed() -> Iterator[str]:
    """Lines from the keyboard, with history and editing where this Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it is what turns line editing on
    pending = ""
    while True:
        try:
            pending += input(". " if pending else "> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n/quit leaves")
            pending = ""
            continue
        if pending.endswith("\\"):
            pending = f"{pending[:-1]}\n"
            continue
        yield pending
        pending = ""


def _piped() -> Iterator[str]:
    """Lines of standard input; one that ends in a backslash is joined with the next."""
    # An invalid byte becomes a lone surrogate, which the tokenizer refuses by name.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore
    pending = ""
    for line in sys.stdin:
        pending += line.rstrip("\r\n")
        if pending.endswith("\\"):
            pending = f"{pending[:-1]}\n"
            continue
        yield pending
        pending = ""
    yield pending
