"""Where the model of a RUN is: the one place that knows what users may point a command at."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from phikit.base.errors import RunError, WeightsError

RUN_HELP = (
    "A run folder, a stage folder, a model folder, a .gguf file, the id of a model that "
    '`phikit pull` fetched, or "smollm2".'
)


class Place(NamedTuple):
    """What was found.

    Attributes:
        model: what `weights.load` takes.
        stage: the stage folder that trained it; None for a model from elsewhere.
        config: the settings of the pipeline it belongs to, as plain data; None likewise.
    """

    model: str | Path
    stage: Path | None = None
    config: dict[str, Any] | None = None


def complete_model(typed: str) -> list[str]:
    """What a shell offers for a model: runs, pulled models and "smollm2"; paths it knows itself."""
    from phikit.weights.inventory import SMOLLM2, pulled_names

    named = [name for name in (*pulled_names(), SMOLLM2) if name.startswith(typed)]
    return [*complete_run(typed), *named]


def complete_run(typed: str) -> list[str]:
    """What a shell offers for a run: those in the usual folder."""
    runs = sorted(str(file.parent) for file in Path().glob("runs/*/config.json"))
    return [name for name in runs if name.startswith(typed)]


def complete_served(typed: str) -> list[str]:
    """The same for NAME=MODEL, where the name is what the user likes."""
    name, is_named, model = typed.rpartition("=")
    return [f"{name}{is_named}{found}" for found in complete_model(model)]


def locate(run: str) -> Place:
    """The model meant by a run, stage or model folder, a `.gguf`, a hub id or "smollm2".

    A run folder means the model of its last finished stage; a hub id means what is on this machine
    already, since no command but `pull` is to fetch gigabytes unasked.

    Raises:
        RunError: there is none; says what was looked for.
        WeightsError: a published model is not on this machine.
    """
    path = Path(run)
    if not path.exists():
        return _elsewhere(run)
    if path.is_file() and path.suffix == ".gguf":
        return Place(path)
    record = _record(path)
    match record.get("kind"):
        case "pipeline":
            stage = last_finished(path, record)
            return Place(stage / "model", stage, record["config"])
        case "stage":
            return _stage_place(path)
    if "model_type" in record:
        return Place(path)
    raise _not_a_run(path, "its config.json describes neither a run nor a model")


def locate_pipeline(run: str) -> tuple[Path, dict[str, Any]]:
    """A pipeline's folder and the content of its config.json; a stage folder means its pipeline.

    Raises:
        RunError: the folder is no run of a pipeline.
    """
    path = Path(run)
    record = _record(path)
    if record.get("kind") == "stage":
        path = path.resolve().parent.parent
        record = _record(path)
    if record.get("kind") != "pipeline":
        raise _not_a_run(path, "its config.json is not that of a pipeline")
    return path, record


def finished_stages(path: Path, record: dict[str, Any]) -> list[Path]:
    """The finished stages of a run, in order.

    A folder keeps stages of older settings too. Those of the current settings count; when there are
    none, as after an update of phikit, which changes fingerprints, the newest of each number.
    """
    from phikit.base.errors import ConfigError
    from phikit.recipes.config import PipelineConfig
    from phikit.recipes.pipeline import stage_folders

    try:
        config = PipelineConfig.resolve(record["config"])
        current = [folder.path for folder in stage_folders(config, path)]
    except ConfigError:
        current = []
    if any(folder.exists() for folder in current):
        return [folder for folder in current if (folder / "result.json").is_file()]
    done = sorted(path.glob("stages/*/result.json"), key=lambda result: result.stat().st_mtime)
    newest = {int(result.parent.name.partition("-")[0]): result.parent for result in done}
    return [newest[number] for number in sorted(newest)]


def last_finished(path: Path, record: dict[str, Any]) -> Path:
    """The folder of the last finished stage.

    Raises:
        RunError: none is finished yet.
    """
    stages = finished_stages(path, record)
    if not stages:
        raise RunError(
            f"no stage of {path} is finished: looked for {path / 'stages' / '*' / 'result.json'}",
            fix=f"go on with: phikit run --resume --out {path} {record['config']['name']}",
        )
    return stages[-1]


def _elsewhere(name: str) -> Place:
    """What goes by a name: the weights of an installed package, and pulled models."""
    from phikit.weights import hub
    from phikit.weights.load import SMOLLM2

    if name == SMOLLM2:
        return Place(name)
    repo_id, file = hub.split_file(name)
    if not hub.is_id(repo_id):
        raise _not_a_run(Path(name), "it does not exist")
    try:
        place = hub.fetch(repo_id, file=file, offline=True)
    except WeightsError as error:
        option = "" if file is None else f" --file {file}"
        raise WeightsError(
            f"there is no folder {name}, and no model of this id has been pulled",
            fix=f"check the path, or fetch the model with: phikit pull {repo_id}{option}",
        ) from error
    return Place(place if file is not None else _only_gguf(place, repo_id) or place)


def _only_gguf(folder: Path, repo_id: str) -> Path | None:
    """The `.gguf` file of a repository that holds nothing else; None for one with a config.

    Raises WeightsError if there are several.
    """
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise WeightsError(
            f"{repo_id} holds several models: {names}", fix=f"name one: {repo_id}/{files[0].name}"
        )
    return files[0] if files else None


def stage_name(folder: Path) -> str:
    """The name of the stage in a folder NUMBER-NAME-FINGERPRINT."""
    return folder.name.partition("-")[2].rpartition("-")[0]


def _stage_place(path: Path) -> Place:
    if not (path / "result.json").is_file():
        raise RunError(
            f"the stage {path} is not finished: it has no result.json",
            fix="finish it with the `phikit run` that began it",
        )
    pipeline = path.resolve().parent.parent / "config.json"
    config = _record(pipeline.parent)["config"] if pipeline.is_file() else None
    return Place(path / "model", path, config)


def _record(path: Path) -> dict[str, Any]:
    """The content of a folder's config.json."""
    file = path / "config.json"
    if not path.exists():
        raise _not_a_run(path, "it does not exist")
    if not file.is_file():
        raise _not_a_run(path, f"looked for {file} and found no file")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_a_run(path, f"{file} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise _not_a_run(path, f"{file} holds no JSON object")
    return record


def _not_a_run(path: Path, reason: str) -> RunError:
    return RunError(
        f"{path} is neither a run nor a model: {reason}",
        fix="give a folder that `phikit run` wrote, a model folder, a .gguf file, or the id of a "
        "model fetched with: phikit pull OWNER/NAME",
    )
