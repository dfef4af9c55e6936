"""`phikit generate`: what its options do to what is printed."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phikit.cli import main
from phikit.weights.load import Loaded
from phikit.weights.save import save

SCHEMA = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3}


@pytest.fixture
def generate(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> Callable[..., str]:
    """Runs the command in this process and gives what it printed; errors end in AssertionError."""
    save(tmp_path / "model", loaded)

    def run(*options: str) -> str:
        command = ["phikit", "generate", str(tmp_path / "model"), "The answer", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        assert ended.value.code in (0, None), error
        return out.removesuffix("\n")

    return run


def test_a_stop_string_is_not_printed(generate):
    whole = generate("--max-new-tokens", "40")
    stop = whole[len(whole) // 2 :][:3]
    for chat in ((), ("--chat",)):
        said = generate("--max-new-tokens", "40", "--stop", stop, "--stop", "never this", *chat)
        assert stop not in said
    assert generate("--max-new-tokens", "40", "--stop", stop) == whole[: whole.index(stop)]


def test_schema_and_regex(generate, tmp_path: Path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    said = json.loads(generate("--schema", str(file), "--max-new-tokens", "90"))
    assert set(said) <= {1, 2}
    reply = json.loads(generate("--regex", "[0-9]{3}", "--json", "--temperature", "1"))
    assert re.fullmatch("[0-9]{3}", reply["text"])
    assert reply["finish_reason"] == "stop"


def test_drawing(generate):
    best = generate("--max-new-tokens", "12")
    for cut in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "1e-9")):
        assert generate("--max-new-tokens", "12", "--temperature", "2", *cut) == best
    assert generate("--max-new-tokens", "12", "--repetition-penalty", "1000") != best


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schema", "none.json"], "none.json cannot be read"),
        (["--schema", "broken.json"], "broken.json is not JSON"),
        (["--schema", "list.json"], "list.json holds no JSON object"),
        (["--schema", "unknown.json"], "Unimplemented keys"),
        (["--regex", "(a"], "unclosed group"),
        (["--stop", ""], "stop is"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--min-p", "2"], "--min-p"),
    ],
)
def test_mistakes_are_named(
    generate, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (("broken", "{"), ("list", "[]"), ("unknown", '{"not": {}}')):
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=words):
        generate(*options)
