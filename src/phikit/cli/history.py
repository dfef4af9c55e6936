"""`phikit history`: the conversations that were kept, to read, search, write out and delete."""

import json
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import DataError

if TYPE_CHECKING:
    from phikit.chat.history import Conversation, History, Turn


class Form(StrEnum):
    """What `--as` takes."""

    jsonl = "jsonl"
    markdown = "markdown"


def _complete_id(typed: str) -> list[tuple[str, str]]:
    from phikit.chat.history import History

    known = History().conversations(limit=200)
    return [(c.id, c.title) for c in known if c.id.startswith(typed)]


Id = Annotated[
    str | None,
    typer.Argument(
        metavar="ID",
        show_default=False,
        help="Show this conversation; the first letters of its id will do.",
        autocompletion=_complete_id,
    ),
]


def history(
    id_: Id = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="List what holds this text.")
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            "--as",
            metavar="FORM",
            help="Write out as jsonl, a message a line, or as markdown: one conversation, or all.",
        ),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the conversation; without ID, all of them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting.")] = False,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="List at most so many.")] = 20,
) -> None:
    """List the conversations that were kept, or show one.

    `phikit chat` and `phikit generate` keep what was said in a file of yours alone, unless they are
    given --no-history, or the environment says PHIKIT_HISTORY=off. Images and sounds are kept as
    their paths. Nothing of it leaves this machine.
    """
    from phikit.chat.history import History

    if search is not None and (id_ is not None or delete or form is not None):
        raise DataError("--search goes alone", fix="leave the others out")
    kept = History()
    chosen = None if id_ is None else kept.find(id_)
    if delete:
        _delete(kept, chosen, yes=yes)
    elif search is not None:
        for found in kept.search(search, limit=limit):
            day = _day(found.conversation.updated)
            typer.echo(f"{found.conversation.id}  {day}  {found.role}: {disarm(found.excerpt)}")
    elif form is not None:
        _write(kept, [chosen] if chosen else _all(kept), form)
    elif chosen is not None:
        typer.echo(_markdown(chosen, kept.turns(chosen.id)))
    else:
        _list(kept.conversations(limit=limit))


def _all(kept: "History") -> "list[Conversation]":
    """Every conversation, the oldest first."""
    found: list[Conversation] = []
    while page := kept.conversations(limit=500, offset=len(found)):
        found += page
    return found[::-1]


def _delete(kept: "History", chosen: "Conversation | None", *, yes: bool) -> None:
    what = "all conversations" if chosen is None else f"{chosen.id}, “{chosen.title}”"
    if not yes:
        typer.confirm(f"delete {what}, for good?", abort=True, err=True)
    count = kept.delete(None if chosen is None else chosen.id)
    typer.echo(f"deleted {count} conversation{'' if count == 1 else 's'}")


def _write(kept: "History", chosen: "list[Conversation]", form: Form) -> None:
    for conversation in chosen:
        turns = kept.turns(conversation.id)
        if form is Form.markdown:
            typer.echo(_markdown(conversation, turns))
        else:
            for turn in turns:
                record: dict[str, Any] = {"conversation": conversation.id, **turn.to_dict()}
                typer.echo(json.dumps(record, ensure_ascii=False))


def _list(conversations: "list[Conversation]") -> None:
    if not conversations:
        typer.echo("Nothing is kept yet.")
        return
    from rich.table import Table
    from rich.text import Text

    from phikit.cli.screen import screen

    heads = ("id", "last spoken in", "model", "turns", "")
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for c in conversations:
        table.add_row(c.id, _day(c.updated), Text(c.model), str(c.turns), Text(disarm(c.title)))
    screen().print(table)


def _markdown(conversation: "Conversation", turns: "list[Turn]") -> str:
    """A conversation for people: a heading for each turn, thinking as a quotation."""
    lines = [f"# {conversation.title or conversation.id}", ""]
    lines += [f"{conversation.id}, {_day(conversation.created)}, {conversation.model}", ""]
    for turn in turns:
        lines += [f"## {turn.message.role}", ""]
        lines += [f"![{medium.kind}]({medium.path or medium.sha256})" for medium in turn.media]
        if turn.message.thinking is not None:
            lines += [f"> {line}" for line in turn.message.thinking.splitlines()] + [""]
        lines += [turn.message.content, ""]
        if turn.tokens is not None and turn.seconds:
            rate = turn.tokens / turn.seconds
            lines += [f"*{turn.tokens} tokens, {rate:.0f} tokens/s, {turn.finish_reason}*", ""]
    return disarm("\n".join(lines).rstrip())


def disarm(text: str) -> str:
    """The text without what a terminal would obey."""
    from phikit.cli.conversation import disarmed

    return disarmed(text)


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M")
