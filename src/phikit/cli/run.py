"""`phikit run` and `phikit train`: a pipeline, or one of its stages with what it stands on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import ConfigError, RunError
from phikit.cli.settings import complete_recipe, complete_stage, leaves, resolve, saved
from phikit.cli.stop import command, stoppable

if TYPE_CHECKING:
    from phikit.recipes.config import PipelineConfig

SHOWN_CHANGES = 5

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="Change a setting; may be repeated. A stage goes by its name: "
        "--set stages.sft.loop.epochs=2.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show settings, parameters, tokens and memory, and start nothing."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run folder; runs/PIPELINE if not given."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in the folder, under the settings it was started with. "
        "Repeating the first command does the same.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="CONFIG.JSON", help="Start from a saved config in place of the recipe."
    ),
]


def run(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE",
            show_default=False,
            help="See recipes.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    assignments: Set = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    source: From = None,
) -> None:
    """Run a pipeline: whatever of its stages is not done yet, then the table and the report."""
    with stoppable(kept="finished stages and checkpoints are kept"):
        config, folder = resolve(pipeline, assignments or [], source=source, out=out, resume=resume)
        _show(config) if dry_run else _run(config, folder, until=None)


def train(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE.STAGE",
            help="Such as nano_reasoner.sft.",
            autocompletion=complete_stage,
        ),
    ],
    assignments: Set = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    source: From = None,
) -> None:
    """Train a pipeline up to one stage; finished stages before it are used as they are."""
    with stoppable(kept="finished stages and checkpoints are kept"):
        pipeline, _, until = stage.partition(".")
        config, folder = resolve(pipeline, assignments or [], source=source, out=out, resume=resume)
        names = [stage.name for stage in config.stages]
        if until not in names:
            what = f"no stage {until!r}" if until else "no stage named"
            raise ConfigError(
                f"{what} in {stage!r}",
                fix=f"name one of them: {', '.join(f'{pipeline}.{name}' for name in names)}",
            )
        _show(config) if dry_run else _run(config, folder, until=until)


def _run(config: "PipelineConfig", folder: Path, *, until: str | None) -> None:
    from phikit.base.progress import Progress
    from phikit.cli.screen import screen
    from phikit.evals.media_report import family_table
    from phikit.evals.table import stage_table
    from phikit.recipes import pipeline_for

    console = screen()
    _tell_changes(config, folder)
    typer.echo(f"{config.name}: {len(config.stages)} stages, into {folder}")
    with Progress(console=console) as progress:
        results = pipeline_for(config, folder, progress=progress).run(until=until)
    console.print()
    console.print(stage_table(results))
    if "chance" in results:
        console.print()
        console.print(family_table(results))
    console.print()
    typer.echo(f"report: {folder / 'report.html'}")
    typer.echo(f"chat:   {command(['chat', str(folder)])}")


def _tell_changes(config: "PipelineConfig", folder: Path) -> None:
    """Say which settings differ from those of the run that the folder holds."""
    from phikit.base.config import differences

    if not (folder / "config.json").is_file():
        return
    try:
        before = dict(leaves(saved(folder)))
    except ConfigError as error:
        raise RunError(
            f"{folder} holds something else: {error.what}", fix="choose another folder with --out"
        ) from error
    changes = differences(before, dict(leaves(config.model_dump(mode="json"))))
    if not changes:
        return
    typer.echo(f"{folder} was run with other settings; what they touch is done anew:", err=True)
    for change in changes[:SHOWN_CHANGES]:
        typer.echo(f"  {change.path}: {change.a!r} -> {change.b!r}", err=True)
    if len(changes) > SHOWN_CHANGES:
        typer.echo(f"  and {len(changes) - SHOWN_CHANGES} more", err=True)


def _show(config: "PipelineConfig") -> None:
    from phikit.cli.plan import show_plan

    show_plan(config)
