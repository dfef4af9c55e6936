"""The table of verbs, and how a command ends.

A verb imports the rooms it uses inside its function, so `phikit --help` loads no torch. A typed
error ends a command with its two lines and exit code 1; anything else is a bug of ours and keeps
its traceback.
"""

from typing import Annotated

import typer

import phikit
from phikit.base.errors import Interrupted, PhikitError
from phikit.cli.chat import chat
from phikit.cli.evaluate import evaluate
from phikit.cli.look import diff, recipes, report
from phikit.cli.run import run, train

INTERRUPTED = 130
"""Exit code after Ctrl-C, the same that shells give."""

VERBS = {
    "run": run,
    "train": train,
    "chat": chat,
    "eval": evaluate,
    "report": report,
    "diff": diff,
    "recipes": recipes,
}

app = typer.Typer(
    name="phikit",
    help="Train small reasoning models by published recipes, judge them, and talk to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, verb in VERBS.items():
    app.command(name)(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phikit {phikit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process and end it."""
    try:
        app(prog_name="phikit")
    except PhikitError as error:
        typer.echo(f"phikit: {error}", err=True)
        raise SystemExit(INTERRUPTED if isinstance(error, Interrupted) else 1) from None
