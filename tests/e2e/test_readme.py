"""The Python of README.md, as it stands there, on small random weights in place of real ones."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(
    random_model: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
):
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert '"smollm2"' in example
    exec(example.replace("smollm2", str(random_model(160))), {})
    assert capsys.readouterr().out
