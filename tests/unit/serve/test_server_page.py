"""The programs of docs/server.md do what the page says."""

import re
from pathlib import Path

import pytest
from tests.unit.serve.house import House

from phikit.serve import openai_ask

PAGE = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
PROGRAMS = [code for code in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL) if ":8000" in code]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_clients_get_answers(house: House, program: str, monkeypatch, capsys):
    monkeypatch.setattr(openai_ask, "random_seed", lambda: 3)
    program = program.replace("http://127.0.0.1:8000", house.url).replace("smollm2", "tiny")
    exec(compile(program, "server.md", "exec"), {"__name__": "program"})
    assert len(capsys.readouterr().out) > 5


def test_there_are_programs():
    assert len(PROGRAMS) == 3
