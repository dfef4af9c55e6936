"""From the shared options of `run` and `train` to one complete config, and back to its settings."""

import inspect
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from phikit.base.errors import ConfigError, RunError

if TYPE_CHECKING:
    from phikit.recipes.config import PipelineConfig


def recipe(name: str, assignments: Sequence[str] = ()) -> tuple["PipelineConfig", list[str]]:
    """The config that the recipe called `name` returns, and the assignments that are left.

    A recipe may have parameters of its own, such as the backbone that it starts from; an assignment
    to one of them chooses among its configs.

    Raises:
        ConfigError: there is no such recipe, or nothing of this name to set; names the nearest.
    """
    from phikit.recipes import PIPELINES
    from phikit.recipes.config import PipelineConfig

    if name not in PIPELINES:
        near = get_close_matches(name, PIPELINES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no recipe {name!r}",
            fix=f"did you mean {near}? `phikit recipes` lists all {len(PIPELINES)}",
        )
    own = inspect.signature(PIPELINES[name]).parameters
    pairs = [assignment.partition("=") for assignment in assignments]
    chosen = {key.strip(): value for key, _, value in pairs if key.strip() in own}
    left = ["".join(pair) for pair in pairs if pair[0].strip() not in own]
    for key in (each.partition("=")[0].strip() for each in left):
        near = get_close_matches(key, [*own, *PipelineConfig.model_fields], n=1)
        if key not in PipelineConfig.model_fields and near and near[0] in own:
            raise ConfigError(f"{name} has no setting {key!r}", fix=f"did you mean {near[0]}?")
    return PIPELINES[name](**chosen), left


def own_settings(name: str) -> list[str]:
    """What `--set` takes of a recipe beside the settings of its config, with the values."""
    from phikit.recipes import PIPELINES

    own = inspect.signature(PIPELINES[name]).parameters.values()
    return [
        f"{each.name}={'|'.join(get_args(each.annotation)) or each.default or '...'}"
        for each in own
    ]


def complete_recipe(typed: str) -> list[str]:
    """What a shell offers for a pipeline."""
    from phikit.recipes import PIPELINES

    return [name for name in PIPELINES if name.startswith(typed)]


def complete_stage(typed: str) -> list[str]:
    """What a shell offers for PIPELINE.STAGE: pipelines, and after the dot the stages of one."""
    name, dot, stage = typed.partition(".")
    if not dot:
        return [f"{found}." for found in complete_recipe(typed)]
    stages = [each.name for each in recipe(name)[0].stages]
    return [f"{name}.{each}" for each in stages if each.startswith(stage)]


def saved(path: Path) -> dict[str, Any]:
    """The pipeline config in a `config.json`, or in the run folder that holds one, as plain data.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    file = path / "config.json" if path.is_dir() else path
    fix = "pass the config.json of a run folder"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", fix=fix) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", fix=fix) from error
    if not isinstance(record, dict) or record.get("kind") != "pipeline" or "config" not in record:
        raise ConfigError(f"{file} is not the config of a pipeline", fix=fix)
    return record["config"]


def resolve(
    name: str | None,
    assignments: Sequence[str],
    *,
    source: Path | None,
    out: Path | None,
    resume: bool,
) -> tuple["PipelineConfig", Path]:
    """The config to run, and its folder.

    Without `source` and `resume` the recipe called `name` is the start; `source` is a saved config;
    `resume` takes the one in the run folder. Assignments come last.

    Raises:
        ConfigError: lists every fault of the settings.
        RunError: there is nothing to resume.
    """
    from phikit.recipes.config import PipelineConfig

    if resume and source is not None:
        raise ConfigError(
            "--resume and --from each name a config to start from", fix="give one of them"
        )
    if source is not None:
        config = PipelineConfig.resolve(saved(source), assignments)
    elif name is None:
        raise ConfigError("no recipe named", fix="name one: `phikit recipes` lists them")
    else:
        config, left = recipe(name, assignments)
        if resume and len(left) < len(assignments):
            raise ConfigError(
                f"a run goes on with the {name} that it was started with",
                fix="leave --resume out to start another in its place, or name a folder with --out",
            )
        assignments = left
    folder = out or Path("runs") / config.name
    if resume:
        config = PipelineConfig.resolve(_resumed(folder), assignments)
    elif source is None:
        config = config.override(assignments)
    if name is not None and config.name != name:
        raise ConfigError(
            f"{source or folder} is a config of {config.name}, not of {name}",
            fix=f"run {config.name}, or choose another folder with --out",
        )
    return config, folder


def _resumed(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise RunError(
            f"nothing to resume: {folder} is not a run, it has no config.json",
            fix="leave --resume out to start one, or name the folder with --out",
        )
    return saved(folder)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of plain data with their dotted paths; an item of a list goes by its name."""
    items: dict[str, Any] = {}
    if isinstance(value, dict):
        items = value
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        items = {str(item.get("name", i)): item for i, item in enumerate(value)}
    if not items:
        yield path, value
    for key, inner in items.items():
        yield from leaves(inner, f"{path}.{key}" if path else str(key))
