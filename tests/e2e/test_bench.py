"""`phikit bench` on a model of random weights."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phikit.base import bandwidth

Phikit = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--prompt", 16, "--new", 4, "--rounds", 2, "--batch", 2, "--batch", 1)


@pytest.fixture
def model(random_model: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bandwidth.read_speeds, "__kwdefaults__", {"block_bytes": 1 << 22})
    return random_model(160)


def test_figures_for_people(phikit: Phikit, model: Path):
    shown = phikit("bench", model, *SMALL)
    assert shown.returncode == 0, shown.stderr
    for words in ("first token", "prefill", "decode, batch 1", "decode, batch 2", "memory speed"):
        assert words in shown.stdout, words
    assert shown.stdout.index("batch 1") < shown.stdout.index("batch 2")
    assert "kernels" in shown.stdout and "16 tokens" in shown.stdout
    assert "decode, batch 2" in shown.stderr  # progress


def test_figures_for_programs(phikit: Phikit, model: Path):
    shown = phikit("bench", model, *SMALL, "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["prompt_tokens"] == 16 and found["new_tokens"] == 4
    assert found["weight_bytes"] > 0 and found["peak_memory_bytes"] > found["weight_bytes"]
    assert [row["batch"] for row in found["decode"]] == [1, 2]
    speed = found["bandwidth_bytes_per_s"]["median"]
    for row in found["decode"]:
        rate = row["tokens_per_s"]["median"]
        assert row["tokens_per_s_and_sequence"] == pytest.approx(rate / row["batch"])
        steps = rate / row["batch"]
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes_per_step"] * steps / speed)
    prefill, wait = found["prefill_tokens_per_s"], found["first_token_s"]
    assert prefill["high"] == pytest.approx(16 / wait["low"])
    assert prefill["low"] == pytest.approx(16 / wait["high"])


def test_sizes_are_chosen_to_fit_a_small_context(phikit: Phikit, model: Path):
    shown = phikit("bench", model, "--batch", 1, "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["prompt_tokens"] == 80 and found["new_tokens"] == 26


def test_what_does_not_fit_is_an_error(phikit: Phikit, model: Path):
    refused = phikit("bench", model, "--prompt", 150, "--new", 10)
    assert refused.returncode == 1
    assert "context is 160" in refused.stderr and "Next:" in refused.stderr


def test_ctrl_c(start: Callable[..., subprocess.Popen[str]], random_model: Callable[[int], Path]):
    process = start("bench", random_model(100_000), "--prompt", 10, "--new", 20_000, "--batch", 1)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("bench"), line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "keeps nothing" in rest and "Traceback" not in rest
