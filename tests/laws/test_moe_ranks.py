"""Two processes that train a mixture of experts do what one does alone, draws apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.laws.moe_rank import STEPS, prepare, run_all
from tests.laws.training import metrics_of
from torch import Tensor

from phikit.base.device import Rank

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    prepare(folder)
    run_all(folder, Rank())
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    prepare(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.laws.moe_rank", str(folder), str(index), "2"],
            cwd=ROOT,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]
    return folder


def tensors(folder: Path, name: str) -> list[dict[str, Tensor]]:
    """What each process left under this name."""
    return [load_file(path) for path in sorted(folder.glob(f"{name}-?.safetensors"))]


@pytest.mark.parametrize("name", ["global", "bias"])
def test_two_processes_equal_one(name: str, alone: Path, together: Path):
    """Loads are those of all ranks: in the loss, in the bias, and in the log."""
    [expected], found = tensors(alone, name), tensors(together, name)
    assert len(found) == 2
    for weights in found:
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6, msg=key)
    rows, reference = metrics_of(together / name), metrics_of(alone / name)
    assert len(reference) == STEPS
    for row, other in zip(rows, reference, strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, abs=1e-5)
    if name == "bias":
        assert expected["model.layers.0.mlp.router.bias"].abs().max() > 0


def test_ranks_with_fewer_micro_batches_wait_for_nobody(together: Path):
    first, second = tensors(together, "uneven")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(metrics_of(together / "uneven")) == 4


def test_data_ranks_draw_apart_and_tensor_ranks_together(alone: Path, together: Path):
    """Ranks of one data-parallel rank need no broadcast to agree."""
    [expected], (first, second) = tensors(alone, "draws"), tensors(together, "draws")
    assert not torch.equal(first["data"], second["data"])
    assert torch.equal(first["tensor"], second["tensor"])
    assert torch.equal(first["tensor"], expected["tensor"])


def test_experts_split_along_their_width(alone: Path, together: Path):
    [expected] = tensors(alone, "parts")
    for found in tensors(together, "parts"):
        torch.testing.assert_close(found["y"], expected["y"], rtol=0, atol=1e-6)


def test_sharded_weights(alone: Path, together: Path):
    """Under FSDP2 gradients, those of the balance loss among them, are the unsharded ones."""
    [expected] = tensors(alone, "sharded")
    assert any(".router." in name for name in expected)
    for found in tensors(together, "sharded"):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
