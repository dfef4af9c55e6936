"""The metrics log (one JSON line per step) and the optional trackers that mirror it.

The log is the truth; a tracker is a view. A run that resumes from step N first drops every line
after N, so that the log of an interrupted run equals that of an unbroken one.
"""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from phikit.base.errors import ConfigError, MissingExtraError, RunError
from phikit.base.files import storage_errors, write_atomic

Value = float | str


class MetricsLog:
    """`metrics.jsonl`: `{"step": 12, "loss": 1.5, ...}`, appended and flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line. NaN and infinities become text, which every JSON reader accepts."""
        line = json.dumps({"step": step} | {name: _plain(value) for name, value in values.items()})
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a torn last line (the process died while writing) is left out.

        Raises:
            RunError: a line in the middle is not JSON.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunError(
                    f"{self.path}, line {number}: not JSON: {line[:80]!r}", fix="remove that line"
                ) from error
        return rows

    def truncate(self, after_step: int) -> None:
        """Drop lines whose step is greater than `after_step`, and a torn last line."""
        if self.path.exists():
            kept = [row for row in self.read() if row["step"] <= after_step]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Tracker(Protocol):
    """A place outside the run folder that shows metrics."""

    def write(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], *, run_path: Path, config: Mapping[str, Any]
) -> list[Tracker]:
    """Open the named trackers: `"tensorboard"`, `"wandb"`, `"trackio"`.

    Raises:
        ConfigError: a name is unknown.
        MissingExtraError: the tracker's package is not installed.
    """
    unknown = [name for name in names if name not in _TRACKERS]
    if unknown:
        raise ConfigError(
            f"unknown tracker {unknown[0]!r}", fix=f"choose from: {', '.join(_TRACKERS)}"
        )
    return [_TRACKERS[name](Path(run_path), dict(config)) for name in names]


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(extra, extra) from error


class _TensorBoard:
    def __init__(self, run_path: Path, config: dict[str, Any]) -> None:
        board = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = board.SummaryWriter(log_dir=str(run_path / "tensorboard"))
        self._writer.add_text("config", f"``json\n{json.dumps(config, indent=2)}\n``")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class _Dashboard:
    """wandb, and trackio, which speaks the same three calls."""

    def __init__(self, package: str, run_path: Path, config: dict[str, Any]) -> None:
        self._module = _import(package, package)
        self._module.init(project="phikit", name=run_path.name, config=config)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


_TRACKERS = {
    "tensorboard": _TensorBoard,
    "wandb": lambda run_path, config: _Dashboard("wandb", run_path, config),
    "trackio": lambda run_path, config: _Dashboard("trackio", run_path, config),
}
