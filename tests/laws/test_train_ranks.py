"""Two processes that train together do what one does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.laws.train_rank import STEPS, run
from tests.laws.training import Kind, metrics_of, start_run

from phikit.base.device import Rank

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def run_together(kind: Kind, folder: Path, *, size: int) -> None:
    """Train in `size` processes over gloo that share `folder`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = []
    for index in range(size):
        words = ["-m", "tests.laws.train_rank", kind, str(folder), str(index), str(size)]
        command = [sys.executable, *words]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_processes_equal_one(kind: Kind, tmp_path: Path):
    """In GRPO one of them sometimes has no reply to learn from, and must not hold up the other."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(kind, start_run(alone), Rank())
    run_together(kind, start_run(together), size=2)
    expected = load_file(alone / "weights-0.safetensors")
    for index in range(2):
        found = load_file(together / f"weights-{index}.safetensors")
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-6), name
    reference = metrics_of(alone)
    assert len(reference) == STEPS
    for a, b in zip(metrics_of(together), reference, strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
