"""The run folder: everything one run reads and writes, under one path.

`config.json` (the resolved configuration), `metrics.jsonl`, `samples/`, `checkpoints/` and,
at the end, `report.html`. A folder is a run when its `config.json` says so.
"""

import json
from pathlib import Path
from typing import Any, Self

import phikit
from phikit.base.config import Config
from phikit.base.errors import RunError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.metrics import MetricsLog


class Run:
    """A run folder. Make one with `create`, return to it with `open`."""

    def __init__(self, path: Path, *, kind: str, config: dict[str, Any]) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config: Config, *, kind: str) -> Self:
        """Start a run at `path` (made if need be) and record its configuration.

        Raises:
            RunError: a run is already there.
            StorageError: the folder cannot be written.
        """
        path = Path(path)
        record = path / "config.json"
        if record.exists():
            raise RunError(
                f"{path} already holds a run or a model (it has config.json)",
                fix="resume it with --resume, or choose another folder with --out",
            )
        plain = config.model_dump(mode="json")
        run = cls(path, kind=kind, config=plain)
        with storage_errors(path):
            run.samples.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
        text = json.dumps({"phikit": phikit.__version__, "kind": kind, "config": plain}, indent=2)
        write_atomic(record, text + "\n")
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return to a run.

        Raises:
            RunError: `path` is not a run; the message says what was looked for.
        """
        path = Path(path)
        record = path / "config.json"
        fix = "pass a folder that phikit wrote, the one that holds metrics.jsonl and checkpoints/"
        if not record.is_file():
            raise RunError(f"{path} is not a run: looked for {record} and found no file", fix=fix)
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            return cls(path, kind=content["kind"], config=content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is not a run: {record} lacks the fields 'kind' and 'config'", fix=fix
            ) from error
