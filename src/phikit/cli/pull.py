"""`phikit pull`: fetch a published model, and say where it lies."""

import sys
from typing import Annotated

import typer

from phikit.cli.stop import stoppable


def pull(
    repo_id: Annotated[
        str, typer.Argument(metavar="ID", help="Owner and name of a model on the Hugging Face hub.")
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A branch, a tag or a commit.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="NAME", help="One file and no other, such as a .gguf.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask nobody: only say where it is, if it is here.")
    ] = False,
) -> None:
    """Fetch a published model: configuration, tokenizer and safetensors, never code.

    Files go into the cache that all Hugging Face programs share; HF_HOME moves it. A fetch that
    was stopped goes on with the same command.
    """
    from huggingface_hub.utils import disable_progress_bars

    from phikit.cli.screen import in_bytes
    from phikit.weights.hub import fetch, plan

    with stoppable(kept="what has arrived is kept"):
        if not offline:
            needed = plan(repo_id, revision=revision, file=file)
            here = needed.all_files - needed.files
            typer.echo(
                f"{repo_id}: {needed.files} files to fetch, {in_bytes(needed.size)}; "
                f"{here} of {needed.all_files} are here",
                err=True,
            )
        if not sys.stderr.isatty():
            disable_progress_bars()
        place = fetch(repo_id, revision=revision, file=file, offline=offline)
    typer.echo(place)
