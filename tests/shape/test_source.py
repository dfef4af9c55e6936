"""Limits of size, names that say nothing, and calls that would run what a file contains."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_INIT_PARAMETERS = 10
EMPTY_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load"}


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: documentation is never too long here."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def size_faults(path: Path, source: str) -> list[str]:
    faults = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        faults.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in functions(source):
        if function_lines(node) > MAX_FUNCTION_LINES:
            faults.append(
                f"{path}:{node.lineno}: {node.name} has {function_lines(node)} lines, "
                f"at most {MAX_FUNCTION_LINES}"
            )
        arguments = node.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
        if node.name == "__init__" and count > MAX_INIT_PARAMETERS:
            faults.append(f"{path}:{node.lineno}: __init__ takes {count}, at most 10")
    return faults


def safety_faults(path: Path, source: str) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
            if node.module == "torch":
                names += [f"torch.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            allows = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            if any(not (isinstance(v, ast.Constant) and v.value is False) for v in allows):
                names.append("pickle")
        bad = (UNSAFE_MODULES | UNSAFE_CALLS) & set(names)
        line = getattr(node, "lineno", 0)
        faults += [f"{path}:{line}: {name} can run what a file contains" for name in sorted(bad)]
    return faults


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


EVERYWHERE = ("src", "tests", "scripts", "benchmarks", "experiments")


def test_files_and_functions_are_small():
    faults = [
        fault
        for path in python_files(*EVERYWHERE)
        for fault in size_faults(path.relative_to(ROOT), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_names_say_what_is_inside():
    faults = [
        path
        for path in python_files(*EVERYWHERE)
        if EMPTY_NAMES & {*path.relative_to(ROOT).parts[:-1], path.stem}
    ]
    assert not faults, faults


def test_nothing_runs_what_a_file_contains():
    faults = [
        fault
        for path in python_files("src")
        for fault in safety_faults(path.relative_to(ROOT), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_every_module_says_what_it_is():
    silent = [
        path for path in python_files("src") if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, silent


def test_the_size_check_sees():
    path = Path("a.py")
    assert size_faults(path, "x = 1\n" * 500) == []
    assert size_faults(path, "x = 1\n" * 501) != []
    assert size_faults(path, "def f():\n" + "    x = 1\n" * 59) == []
    assert size_faults(path, "def f():\n" + "    x = 1\n" * 60) != []
    assert size_faults(path, 'def f():\n    """a\n\n\nb"""\n' + "    x = 1\n" * 59) == []
    ten = ", ".join(f"a{index}" for index in range(10))
    assert size_faults(path, f"class A:\n    def __init__(self, {ten}): pass") == []
    assert size_faults(path, f"class A:\n    def __init__(self, {ten}, *, b): pass") != []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('a')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "np.load('a', allow_pickle=True)",
        "np.load('a', allow_pickle=flag)",
    ],
)
def test_the_safety_check_sees(source: str):
    assert safety_faults(Path("a.py"), source)


def test_the_safety_check_allows():
    source = "model.eval()\nsafetensors.torch.load(data)\nnp.load('a', allow_pickle=False)"
    assert safety_faults(Path("a.py"), source) == []
