"""A run that was broken off goes on to the result of an unbroken one, or not at all."""

import math
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.laws.training import (
    KINDS,
    Kind,
    make_objective,
    metrics_of,
    tiny_model,
    train_in,
)
from torch import Tensor

from phikit.base.checkpoint import latest_checkpoint
from phikit.base.errors import CheckpointError, Interrupted, NumericsError
from phikit.base.types import Batch
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseModel
from phikit.train.objective import LossOutput, StepData
from phikit.train.optim import OptimConfig

STEPS = 6
OPTIM = OptimConfig(adam_lr=3e-3, muon_lr=0.02, weight_decay=0.1, warmup=0.3, decay=0.5)


class Killed(Exception):
    """The machine went down."""


class After:
    """A tracker that does something after one step, before that step's checkpoint."""

    def __init__(self, step: int, error: type[Exception] | None) -> None:
        self.step, self.error = step, error

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        if step == self.step and self.error is not None:
            raise self.error
        if step == self.step:
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None: ...


def trained(folder: Path, kind: Kind, dtype: torch.dtype, *, seed: int = 0, **how) -> DenseModel:
    model = tiny_model(seed=seed, dtype=dtype)
    objective = make_objective(kind, model, micro=3, steps=STEPS)
    train_in(folder, model, objective, optim=OPTIM, steps=STEPS, checkpoint_every=3, **how)
    return model


def assert_same(found: DenseModel, expected: DenseModel) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_unbroken(kind: Kind, dtype: torch.dtype, tmp_path: Path):
    """Killed after step 5 it goes on from 3, with a model whose own weights are of no account."""
    unbroken = trained(tmp_path / "unbroken", kind, dtype)
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        trained(broken, kind, dtype, trackers=[After(5, Killed)])
    found = latest_checkpoint(broken / "checkpoints")
    assert found is not None and found.name == "step-3"
    assert len(metrics_of(broken)) == 5
    resumed = trained(broken, kind, dtype, seed=7)
    assert_same(resumed, unbroken)
    assert metrics_of(broken) == metrics_of(tmp_path / "unbroken")


def test_stopping_on_request_saves_and_resumes(tmp_path: Path):
    unbroken = trained(tmp_path / "unbroken", "sft", torch.float32)
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted, match="after step 2"):
        trained(broken, "sft", torch.float32, trackers=[After(2, None)])
    found = latest_checkpoint(broken / "checkpoints")
    assert found is not None and found.name == "step-2"
    assert_same(trained(broken, "sft", torch.float32, seed=7), unbroken)


def test_a_request_in_the_last_step_is_heeded(tmp_path: Path):
    """What is trained is kept, and what would follow it is not begun."""
    unbroken = trained(tmp_path / "unbroken", "sft", torch.float32)
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted, match=f"after step {STEPS}"):
        trained(broken, "sft", torch.float32, trackers=[After(STEPS, None)])
    assert_same(trained(broken, "sft", torch.float32, seed=7), unbroken)


def test_a_finished_run_does_no_further_step(tmp_path: Path):
    first = trained(tmp_path, "lm", torch.float32)
    again = trained(tmp_path, "lm", torch.float32, seed=7)
    assert_same(again, first)
    assert len(metrics_of(tmp_path)) == STEPS


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    trained(tmp_path, "lm", torch.float32)
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    weights = found / "optimiser.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimiser\.safetensors"):
        trained(tmp_path, "lm", torch.float32)


def poison(x: Tensor) -> Tensor:
    """The identity, with a gradient that is not a number."""
    bad = x.clone()
    bad.register_hook(lambda gradient: gradient * math.nan)
    return bad


class Poisoned:
    """An SFT objective whose loss, or only its gradient, goes bad at step 2."""

    def __init__(self, *, where: str) -> None:
        self.inner = make_objective("sft", tiny_model())
        self.where, self.step = where, 0

    def step_data(self, step: int) -> StepData:
        self.step = step
        return self.inner.step_data(step)

    def weight(self, batch: Batch) -> float:
        return self.inner.weight(batch)

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        total, metrics = self.inner.loss(model, batch)
        if self.step == 2:
            total = total * math.nan if self.where == "loss" else poison(total)
        return LossOutput(total, metrics)


@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_a_value_that_is_no_number_never_reaches_the_weights(where: str, tmp_path: Path):
    model = tiny_model()
    optim = OptimConfig(adam_lr=1e-3)
    with pytest.raises(NumericsError, match=f"{where} became nan at step 2"):
        train_in(tmp_path / "bad", model, Poisoned(where=where), optim=optim, steps=5)
    good = tiny_model()
    train_in(tmp_path / "good", good, make_objective("sft", good), optim=optim, steps=2)
    assert_same(model, good)
    assert len(metrics_of(tmp_path / "bad")) == 2
