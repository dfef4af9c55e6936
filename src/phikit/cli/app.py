"""The table of verbs, and how a command ends.

A verb imports the rooms it uses inside its function, so `phikit --help` loads no torch. A typed
error ends a command with its two lines and exit code 1; anything else is a bug of ours and keeps
its traceback.
"""

import logging
import sys
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

import phikit
from phikit.base.errors import Interrupted, PhikitError
from phikit.cli.bench import bench
from phikit.cli.chat import chat
from phikit.cli.doctor import doctor
from phikit.cli.evaluate import evaluate
from phikit.cli.export import export
from phikit.cli.generate import generate
from phikit.cli.history import history
from phikit.cli.judge import judge
from phikit.cli.look import diff, recipes, report
from phikit.cli.manage import ls, ps, rm
from phikit.cli.merge import merge
from phikit.cli.pull import pull
from phikit.cli.quantize import quantize
from phikit.cli.run import run, train
from phikit.cli.serve import serve
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
    "serve": Verb(serve, "phikit serve smollm2"),
    "eval": Verb(evaluate, "phikit eval runs/nano_reasoner --task procedural --samples 4"),
    "judge": Verb(judge, "phikit judge --planted 200 --by judge.toml"),
    "pull": Verb(pull, "phikit pull microsoft/Phi-4-mini-instruct"),
    "ls": Verb(ls, "phikit ls"),
    "rm": Verb(rm, "phikit rm microsoft/Phi-4-mini-instruct"),
    "ps": Verb(ps, "phikit ps"),
    "doctor": Verb(doctor, "phikit doctor smollm2"),
    "history": Verb(history, "phikit history --search fractions"),
    "show": Verb(show, "phikit show microsoft/Phi-4-mini-instruct"),
    "export": Verb(export, "phikit export smollm2 smollm2.gguf --to gguf --quant q8_0"),
    "quantize": Verb(quantize, "phikit quantize smollm2 smollm2-int4 --method gptq --report"),
    "merge": Verb(merge, "phikit merge microsoft/Phi-4-mini-instruct my-adapter merged"),
    "bench": Verb(bench, "phikit bench smollm2 --dtype bfloat16 --batch 1 --batch 16"),
    "report": Verb(report, "phikit report runs/nano_reasoner"),
    "diff": Verb(diff, "phikit diff runs/nano_reasoner runs/seed-1"),
    "recipes": Verb(recipes, "phikit recipes"),
}

app = typer.Typer(
    name="phikit",
    help="Run, export and train Phi-class small language models, judge them, and talk to them.",
    no_args_is_help=True,
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
    if sys.stderr.isatty():
        _show_compilation()
    try:
        app(prog_name="phikit")
    except PhikitError as error:
        typer.echo(f"phikit: {error}", err=True)
        raise SystemExit(INTERRUPTED if isinstance(error, Interrupted) else 1) from None


def _show_compilation() -> None:
    """Say why the first command on a machine is silent for ten seconds."""
    log = logging.getLogger("phikit.nn.kernels")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
