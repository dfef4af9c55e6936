"""`phikit eval`: how well a model does on your problems, or on held-out ones of ours."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import ConfigError, DataError, MissingExtraError
from phikit.cli.evaluate_router import evaluate_router
from phikit.cli.locate import RUN_HELP, Place, complete_model, locate
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    from phikit.data.problem import Problem
    from phikit.evals.scorer import Scorer
    from phikit.evals.task import EvalResult
    from phikit.weights.load import Loaded

TASK_PROBLEMS = 500
"""Problems of a task, if no limit is given."""
TEMPERATURE = 0.6
"""For several replies a problem, as in the evaluation of a pipeline."""

Data = Annotated[
    Path | None, typer.Option(metavar="FILE.JSONL", help='Rows of {"question", "answer"}.')
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="Problems of ours: procedural (held-out ones) or transfer (kinds never trained on).",
    ),
]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Replies per problem.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="T", help="If not given: 0 for one reply, 0.6 for several."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Longest reply; as in the run's own evaluation."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Take only so many problems.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="For the transcripts, or with --router for the curve (JSON, and a PNG beside it); in "
        "the samples/ of a run otherwise.",
    ),
]
RouterFile = Annotated[
    Path | None,
    typer.Option(
        "--router",
        metavar="FILE",
        help="Ask the cloud of this router's config too, and show accuracy against cost over the "
        "threshold. RUN is the local model.",
    ),
]


def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_model)
    ],
    data: Data = None,
    task: TaskName = None,
    samples: Samples = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    limit: Limit = None,
    as_json: AsJson = False,
    out: Out = None,
    router: RouterFile = None,
) -> None:
    """Solve problems; tell how many came out right, and what became of the rest.

    A run that has learnt to see or hear needs no --data: it is shown its own held-out problems.
    """
    with stoppable(kept="an evaluation keeps nothing until it is done"), ExitStack() as stack:
        given = _problems(data, task, limit) if data or task or router else None
        place = locate(run)
        shown = None if given else _held_out(place, limit)
        problems = given or shown or _problems(data, task, limit)
        loaded = _load(place)
        if router is not None:
            if samples != 1 or temperature is not None:
                raise ConfigError(
                    "--samples and --temperature do not go with --router",
                    fix="set confidence.samples and confidence.temperature in its config",
                )
            folder = place.stage / "samples" if place.stage else Path()
            evaluate_router(
                router,
                problems,
                loaded,
                max_new_tokens=max_new_tokens or _reply_tokens(place, loaded),
                scorer=_scorer(stack),
                out=out or folder / f"router-{data.stem if data else task}.json",
                as_json=as_json,
            )
            return
        if temperature is None:
            temperature = TEMPERATURE if samples > 1 else 0.0
        settings = {
            "max_new_tokens": max_new_tokens or _reply_tokens(place, loaded),
            "num_samples": samples,
            "temperature": temperature,
        }
        name = "held-out" if shown else data.stem if data else str(task)
        result = _solve(name, problems, loaded, settings, None if shown else _scorer(stack))
        _tell(result, settings, as_json=as_json, by_family=shown is not None)
        path = out or (place.stage / "samples" / f"eval-{name}.txt" if place.stage else None)
        if path is not None:
            _write(result, path)


def _problems(data: Path | None, task: str | None, limit: int | None) -> "list[Problem]":
    from phikit.evals.tasks import task_problems
    from phikit.evals.tasks.jsonl import jsonl_task_problems

    if data is not None and task is None:
        return jsonl_task_problems(data, count=limit)
    if task is not None and data is None:
        return task_problems(task, count=limit or TASK_PROBLEMS)
    raise ConfigError("give one set of problems", fix="either --data FILE.jsonl or --task NAME")


def _held_out(place: Place, limit: int | None) -> "list[Problem] | None":
    """The held-out problems of a run that attaches modalities, spread evenly; None for others."""
    from phikit.data.source import load_problems
    from phikit.recipes.config import PipelineConfig

    if place.config is None or not place.config.get("modalities"):
        return None
    evaluation = PipelineConfig.resolve(place.config).evaluation
    found = load_problems(evaluation.source, split=evaluation.split, seed=evaluation.seed)
    step = 1 if limit is None else max(1, len(found) // limit)
    return found[::step][:limit]


def _load(place: Place) -> "Loaded":
    from phikit.weights.load import load

    return load(place.model)


def _reply_tokens(place: Place, loaded: "Loaded") -> int:
    """The reply length the run was evaluated with; half the context for other models."""
    if place.config is not None:
        return place.config["evaluation"]["max_new_tokens"]
    return min(512, loaded.config.max_context // 2)


def _scorer(stack: ExitStack) -> "Scorer":
    """Symbolic comparison where math-verify is installed, and a word about it where not."""
    from phikit.evals.scorer import math_scorer
    from phikit.evals.verify import Verifier

    try:
        return math_scorer(verifier=stack.enter_context(Verifier()))
    except MissingExtraError as error:
        typer.echo(f"comparing numbers and equal texts only: {error}", err=True)
        return math_scorer()


def _solve(
    name: str,
    problems: "list[Problem]",
    loaded: "Loaded",
    settings: dict[str, Any],
    scorer: "Scorer | None",
) -> "EvalResult":
    """Without a scorer, problems are shown with their media, and judged by family."""
    from rich.console import Console

    from phikit.base.progress import Progress
    from phikit.evals.senses import sense_scorer
    from phikit.evals.task import Task, evaluate
    from phikit.generate.engine import Engine
    from phikit.solve.plain import SamplingConfig, Senses, plain

    sampling = SamplingConfig.resolve(settings)
    with Progress(console=Console(stderr=True)) as progress:
        progress.task(name, len(problems) * sampling.num_samples)
        solver = plain(
            Engine(loaded.model),
            loaded.renderer,
            sampling,
            senses=Senses.of(loaded.model) if scorer is None else None,
            on_progress=lambda _, finished: progress.advance(finished),
        )
        result = evaluate(Task(name, problems, solver, scorer or sense_scorer()))
    if result.statuses["error"] == len(problems) * sampling.num_samples:
        reason = result.records[0].replies[0].reason
        raise DataError(
            f"no problem could be asked: {reason}",
            fix="repair that, or where it is too long lower --max-new-tokens",
        )
    return result


def _tell(
    result: "EvalResult", settings: dict[str, Any], *, as_json: bool, by_family: bool
) -> None:
    from phikit.cli.scores import scores, show_scores
    from phikit.evals.senses import figures

    numbers = scores(result, settings)
    if by_family:
        numbers["senses"] = figures(result)
    if as_json:
        typer.echo(json.dumps(numbers, indent=1))
    else:
        show_scores(numbers)


def _write(result: "EvalResult", path: Path) -> None:
    from phikit.evals.transcripts import transcripts, write_transcripts

    write_transcripts(path, transcripts(result))
    typer.echo(f"transcripts: {path}", err=True)
