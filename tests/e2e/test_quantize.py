"""`phikit quantize`: a folder that every command takes, whole or not at all."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, Popen

import pytest

RandomModel = Callable[[int], Path]
Command = Callable[..., CompletedProcess[str]]


@pytest.fixture
def original(random_model: RandomModel) -> Path:
    return random_model(300)


def test_quantise_then_show_generate_and_compare(phikit: Command, original: Path, tmp_path: Path):
    out = tmp_path / "small"
    done = phikit("quantize", original, out, "--bits", 4, "--method", "gptq", "--report")
    assert done.returncode == 0, done.stderr
    assert "KL a token" in done.stdout and "perplexity" in done.stdout
    assert "quantising, million weights" in done.stderr and "comparing, tokens" in done.stderr
    numbers = json.loads((out / "quantisation.json").read_text())
    assert numbers["text"]["divergence"]["mean"] > 0 and numbers["text"]["tokens"] > 1000
    assert numbers["task"]["original"]["n"] == numbers["task"]["changed"]["n"]
    before, after = numbers["bytes"]
    assert after < before / 3

    shown = phikit("show", out).stdout
    assert "4 bits, embeddings and head 8; groups of 32; gptq" in shown
    assert "bits each" in shown and "input_layernorm 32" in shown
    said = phikit("generate", out, "What is", "--max-new-tokens", 3)
    assert said.returncode == 0, said.stderr


def test_text_of_ones_own(phikit: Command, original: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % ("one two three " * 40))
    (tmp_path / "text.txt").write_text("four five six " * 40)
    for name in ("text.jsonl", "text.txt"):
        more = ("--method", "gptq", "--calibration", tmp_path / name)
        done = phikit("quantize", original, tmp_path / f"out-{name}", "--bits", 8, *more)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", 5), "bits"),
        (("--group", 40), "group"),
        (("--method", "awq"), "method"),
        (("--calibration", "text.txt"), "--method gptq alone"),
        (("--method", "gptq", "--calibration", "missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_wrong_options_leave_nothing(
    phikit: Command, original: Path, tmp_path: Path, options: tuple[object, ...], words: str
):
    failed = phikit("quantize", original, tmp_path / "out", *options)
    assert failed.returncode == 1 and words in failed.stderr and "Next: " in failed.stderr
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_line_without_text_is_named(phikit: Command, original: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a b c"}\n{"txt": "a"}\n')
    more = ("--method", "gptq", "--calibration", tmp_path / "bad.jsonl")
    failed = phikit("quantize", original, tmp_path / "out", *more)
    assert failed.returncode == 1 and "bad.jsonl:2" in failed.stderr


def test_what_is_there_is_not_overwritten(phikit: Command, original: Path, tmp_path: Path):
    assert phikit("quantize", original, tmp_path / "out").returncode == 0
    failed = phikit("quantize", original, tmp_path / "out", "--bits", 8)
    assert failed.returncode == 1 and "is there already" in failed.stderr
    again = phikit("quantize", tmp_path / "out", tmp_path / "twice")
    assert again.returncode == 1 and "quantised to 4 bits" in again.stderr
    hf = phikit("export", tmp_path / "out", tmp_path / "hf", "--to", "hf")
    assert hf.returncode == 1 and "--dequantize" in hf.stderr


def test_a_stop_leaves_nothing_half_written(
    start: Callable[..., Popen[str]], original: Path, tmp_path: Path
):
    out = tmp_path / "out"
    process = start("quantize", original, out, "--method", "gptq", "--report")
    assert process.stdout is not None
    for line in process.stdout:
        if "comparing" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "nothing is written" in said
    time.sleep(0.1)
    assert not out.exists() and not list(tmp_path.glob(".*part"))
