"""What a step's gradient is: independent of how the step is cut up, and equal to the textbook's."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.laws.training import (
    KINDS,
    ROWS,
    Kind,
    assert_equal_gradients,
    coin,
    examples,
    gradient_of_step,
    grpo_config,
    make_objective,
    metrics_of,
    nano_renderer,
    pairs,
    problems,
    tiny_model,
)
from torch import Tensor

from phikit.base.types import Example
from phikit.chat.message import Message
from phikit.data.problem import Problem
from phikit.models.dense import DenseModel
from phikit.solve.solver import Reply
from phikit.train.dpo import DPOConfig, DPOObjective, add_reference
from phikit.train.grpo import GRPOObjective, Rated
from phikit.train.lm import LMConfig, LMObjective
from phikit.train.sft import SFTConfig, SFTObjective


def log_probs(model: DenseModel, example: Example, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of every learnt token, one sequence at a time, from the full logits."""
    tokens = torch.from_numpy(example.tokens).long()
    table = F.log_softmax(model(tokens[None])[0, :-1] / temperature, dim=-1)
    chosen = table.gather(1, tokens[1:, None])[:, 0]
    return chosen[torch.from_numpy(example.loss_mask[1:])]


def gradient_of(model: DenseModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [3, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_equals_one_batch(kind: Kind, micro: int, tmp_path: Path):
    """Micro-batches of like and of unlike size; with 3 the last one is smaller."""

    def gradient(name: str, size: int) -> dict[str, Tensor]:
        model = tiny_model()
        objective = make_objective(kind, model, micro=size)
        assert (len(objective.step_data(0).batches) > 1) == (size < ROWS)
        return gradient_of_step(tmp_path / name, model, objective)

    assert_equal_gradients(gradient("cut", micro), gradient("whole", ROWS))
    [cut], [whole] = metrics_of(tmp_path / "cut"), metrics_of(tmp_path / "whole")
    assert cut == pytest.approx(whole, abs=1e-5)


def test_sft_gradient_is_that_of_the_mean_over_all_learnt_tokens(tmp_path: Path):
    model = tiny_model()
    data = examples(ROWS)
    objective = SFTObjective(data, SFTConfig(examples_per_step=ROWS, micro_examples=3), seed=0)
    found = gradient_of_step(tmp_path, model, objective)
    loss = -torch.cat([log_probs(model, example) for example in data]).mean()
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_equal_gradients(found, gradient_of(model, loss))


def test_packed_equals_unpacked(tmp_path: Path):
    data = [Example(e.tokens, np.ones(len(e), np.bool_)) for e in examples(ROWS)]
    packed = LMObjective(data, LMConfig(row_tokens=48, rows_per_step=1, micro_rows=1), seed=0)
    rows = len(packed.rows)
    assert rows < len(data)
    config = LMConfig(row_tokens=48, rows_per_step=rows, micro_rows=rows)
    packed = LMObjective(data, config, seed=0)
    unpacked = SFTObjective(data, SFTConfig(examples_per_step=ROWS, micro_examples=ROWS), seed=0)
    assert_equal_gradients(
        gradient_of_step(tmp_path / "packed", tiny_model(), packed),
        gradient_of_step(tmp_path / "unpacked", tiny_model(), unpacked),
    )


def test_dpo_starts_at_ln_2(tmp_path: Path):
    """Policy and reference are one model then, whatever else shares their batches."""
    model = tiny_model()
    reference = add_reference(model, pairs(ROWS), micro_pairs=5)
    config = DPOConfig(pairs_per_step=ROWS, micro_pairs=3, nll_weight=0.0)
    gradient_of_step(tmp_path, model, DPOObjective(reference, config, seed=0))
    [metrics] = metrics_of(tmp_path)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-6)


def test_dpo_gradient_is_the_papers(tmp_path: Path):
    """Equation 7 of Rafailov et al., 2023, written with the full logits."""
    model, reference = tiny_model(), tiny_model(seed=9)
    data = pairs(ROWS)
    rated = add_reference(reference, data, micro_pairs=4)
    config = DPOConfig(pairs_per_step=ROWS, micro_pairs=3, beta=0.3, nll_weight=0.2)
    found = gradient_of_step(tmp_path, model, DPOObjective(rated, config, seed=0))
    loss = torch.zeros(())
    for pair in data:
        (chosen, rejected), old = (
            [log_probs(of, side) for side in pair] for of in (model, reference)
        )
        margin = (chosen.sum() - old[0].sum()) - (rejected.sum() - old[1].sum())
        loss = loss - F.logsigmoid(0.3 * margin) - 0.2 * chosen.mean()
    assert_equal_gradients(found, gradient_of(model, loss / ROWS))


class Witness:
    """A coin for a reward that remembers what it was shown."""

    def __init__(self) -> None:
        self.groups: list[Rated] = []

    def __call__(self, shown: Sequence[tuple[Problem, Reply]]) -> list[float]:
        rewards = coin(shown)
        size = ROWS // 2
        for start in range(0, len(shown), size):
            part = shown[start : start + size]
            self.groups.append(Rated(part[0][0], [r for _, r in part], rewards[start:][:size]))
        return rewards


def test_on_policy_grpo_is_reinforce_with_a_baseline(tmp_path: Path):
    """Williams, 1992: sum of (reward - baseline) times the score, over all sampled tokens."""
    model, renderer, witness = tiny_model(), nano_renderer(), Witness()
    config = grpo_config(temperature=0.9, micro_rows=3)
    objective = GRPOObjective(model, renderer, problems(6), witness, config, steps=5, seed=1)
    found = gradient_of_step(tmp_path, model, objective)
    total, count = torch.zeros(()), 0
    for group in witness.groups:
        prompt = renderer.prompt([Message(role="user", content=group.problem.question)])
        baseline = sum(group.rewards) / len(group.rewards)
        for reply, reward in zip(group.replies, group.rewards, strict=True):
            if reward == baseline:
                continue
            tokens = np.array([*prompt, *reply.tokens], np.int32)
            example = Example(tokens, np.arange(len(tokens)) >= len(prompt))
            total = total + (reward - baseline) * log_probs(model, example, temperature=0.9).sum()
            count += len(reply.tokens)
    assert count > 0
    assert_equal_gradients(found, gradient_of(model, -total / count), tolerance=1e-5)


def test_the_clip_does_nothing_on_policy(tmp_path: Path):
    def gradient(name: str, bound: float) -> dict[str, Tensor]:
        model = tiny_model()
        config = grpo_config(clip_low=bound, clip_high=bound)
        objective = GRPOObjective(
            model, nano_renderer(), problems(6), coin, config, steps=5, seed=1
        )
        return gradient_of_step(tmp_path / name, model, objective)

    narrow, wide = gradient("narrow", 1e-3), gradient("wide", 0.9)
    assert metrics_of(tmp_path / "narrow")[0]["clipped"] == 0
    assert metrics_of(tmp_path / "narrow")[0]["sampler_kl"] == pytest.approx(0.0, abs=1e-6)
    for name, value in wide.items():
        assert torch.equal(narrow[name], value)


@pytest.mark.parametrize(("shift", "sign"), [(-1.0, 1.0), (1.0, -1.0)])
def test_the_clip_stops_what_has_gone_far_enough(shift: float, sign: float):
    """A token already likelier (less likely) than when sampled gains (loses) no more."""
    model = tiny_model()
    objective = make_objective("grpo", model)
    [batch] = objective.step_data(0).batches
    advantages = torch.full_like(batch.extras["advantage_N"], sign)
    old = batch.extras["old_log_probs_N"] + shift
    moved = batch._replace(
        extras=batch.extras | {"advantage_N": advantages, "old_log_probs_N": old}
    )
    objective.loss(model, moved).total.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)
    free = batch._replace(extras=moved.extras | {"advantage_N": -advantages})
    objective.loss(model, free).total.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.grad is not None)


def test_examples_of_the_laws_differ_in_length():
    """Else token weighting could not be told from row weighting."""
    lengths = [len(example) for example in examples(ROWS)]
    assert any(a != b for a, b in pairwise(lengths))
