"""Nothing is lost: a run killed anywhere goes on to the results of an unbroken one."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Shell = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
Tiny = tuple[str, ...]
MID_STEPS = 120
STEPS = {"pretrain": 12, "mid": MID_STEPS, "sft": 12, "dpo": 6, "rl": 6}
PATIENCE_S = 120.0


def untimed(value: Any) -> Any:
    """The value without what a clock measured."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [untimed(inner) for inner in value]
    return value


def results(out: Path) -> Any:
    return untimed(json.loads((out / "results.json").read_text()))


def steps_done(out: Path, stage: str) -> int:
    """Steps that the stage has logged; -1 before it began."""
    logs = list(out.glob(f"stages/*-{stage}-*"))
    if not logs:
        return -1
    log = logs[0] / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_step(step: int, out: Path, stage: str, process: subprocess.Popen[str]) -> None:
    """Wait until the stage has logged so many steps, while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while steps_done(out, stage) < step and process.poll() is None:
        assert time.monotonic() < deadline, "the run is stuck"
        time.sleep(0.005)


def test_killed_in_every_stage_it_ends_with_the_same_results(
    shell: Shell, start: Start, tiny: Tiny, finished: Path, tmp_path: Path
):
    chance = random.Random(0)
    run = ("run", "nano_reasoner", "--out", tmp_path, *tiny)
    for stage, steps in STEPS.items():
        process = start(*run)
        wait_for_step(chance.randrange(steps + 1), tmp_path, stage, process)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        output, _ = process.communicate()
        assert "Traceback" not in output, output
    done = shell(*run)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(finished)


def test_interrupted_it_saves_and_says_how_to_go_on(
    shell: Shell, start: Start, tiny: Tiny, tmp_path: Path
):
    long = ("--set", "stages.pretrain.loop.steps=100000")
    train = ("train", "nano_reasoner.pretrain", "--out", str(tmp_path))
    process = start(*train, *tiny, *long)
    wait_for_step(4, tmp_path, "pretrain", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"-m phikit.cli train nano_reasoner.pretrain --out {tmp_path}" in output
    [stage] = tmp_path.glob("stages/*")
    damaged = damage(stage)
    failed = shell(*train, "--resume")
    assert failed.returncode == 1
    assert f"{damaged} is damaged" in failed.stderr and "Traceback" not in failed.stderr
    assert f"Next: delete {damaged.parent}" in failed.stderr


def damage(stage: Path) -> Path:
    """Change one bit of the newest checkpoint; returns the file."""
    newest = max(stage.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    file = newest / "optimiser.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file
