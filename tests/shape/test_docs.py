"""What the pages say is there is there: links, commands, and tables made from the code."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from typer.core import TyperGroup

from phikit.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "docs").rglob("*.md"),
]
FROM_CODE = ("recipes", "commands", "settings", "families", "checkpoints", "limits")
"""Generated parts that need no measurement, or one that lies in docs/results/."""


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "scripts" / "build_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line.rpartition("| ")[2] for block in blocks for line in block.splitlines()]
    return [line.partition("  #")[0] for line in lines if line.startswith("phikit ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"(?:\]\(|src(?:set)?=\")(?!https?://)([^)#\"]+)", page.read_text())
    # Pictures are drawn from measured results by `make docs`.
    absent = [link for link in links if not (page.parent / link).exists()]
    assert not [link for link in absent if "docs/images/" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path):
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for line in shell_lines(page.read_text()):
        _, verb, *words = line.split()
        known = {flag for p in group.commands[verb].params for flag in p.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_made_from_code_are_current(page: Path):
    text, docs = page.read_text(), builder()
    for name in FROM_CODE:
        found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if found:
            assert found[1] == docs.PARTS[name](), f"{name} in {page.name}: run `make docs`"


def test_the_checks_see():
    text = "```sh\nphikit run x --out y  # note\necho 1 | phikit chat z\n```"
    assert shell_lines(text) == ["phikit run x --out y", "phikit chat z"]
