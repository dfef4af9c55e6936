"""The table of verbs, and how a command ends.

A verb imports the rooms it uses inside its function, so `phikit --help` loads no torch. A typed
error ends a command with its two lines and exit code 1; anything else is a bug of ours and keeps
its traceback.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

import phikit
from phikit.base.errors import Interrupted, PhikitError
from phikit.cli.chat import chat
from phikit.cli.convert import convert, merge
from phikit.cli.evaluate import evaluate
from phikit.cli.generate import generate
from phikit.cli.look import diff, recipes, report
from phikit.cli.pull import pull
from phikit.cli.run import run, train
from phikit.cli.show import show

INTERRUPTED = 130
"""Exit code after Ctrl-C, the same that shells give."""


class Verb(NamedTuple):
    """A command, and a line that shows it in use."""

    function: Callable[..., None]
    example: str


VERBS = {
    "run": Verb(run, "phikit run nano_reasoner --set seed=1 --out runs/seed-1"),
    "train": Verb(train, "phikit train nano_reasoner.sft --set stages.sft.loop.epochs=2"),
    "chat": Verb(chat, "phikit chat runs/nano_reasoner"),
    "generate": Verb(generate, 'phikit generate smollm2 "The capital of France is"'),
    "eval": Verb(evaluate, "phikit eval runs/nano_reasoner --task procedural --samples 4"),
    "pull": Verb(pull, "phikit pull microsoft/Phi-4-mini-instruct"),
    "show": Verb(show, "phikit show microsoft/Phi-4-mini-instruct"),
    "convert": Verb(convert, "phikit convert smollm2 smollm2.gguf --to gguf --quant q8_0"),
    "merge": Verb(merge, "phikit merge microsoft/Phi-4-mini-instruct my-adapter merged"),
    "report": Verb(report, "phikit report runs/nano_reasoner"),
    "diff": Verb(diff, "phikit diff runs/nano_reasoner runs/seed-1"),
    "recipes": Verb(recipes, "phikit recipes"),
}

app = typer.Typer(
    name="phikit",
    help="Run, convert and train Phi-class small language models, judge them, and talk to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, verb in VERBS.items():
    app.command(name, epilog=f"Example: {verb.example}")(verb.function)


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
