"""The sigmoid loss: in pieces what it is in one, right on paper, and something to learn from."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.laws.training import metrics_of, train_in
from tests.modalities import MODALITIES, image, taught

from phikit.base.device import Rank
from phikit.base.errors import ConfigError, DataError
from phikit.base.media import Media
from phikit.base.types import Example
from phikit.models.decoder import Decoder
from phikit.train.contrastive import (
    ContrastiveConfig,
    ContrastiveObjective,
    Pair,
    Similarity,
    embed,
    pair_batch,
    recall_at,
    sigmoid_loss,
)
from phikit.train.optim import OptimConfig

CONFIG = ContrastiveConfig(pairs_per_step=6, chunk_pairs=4)


def row(tokens: list[int], media: Media | None = None) -> Example:
    return Example(np.array(tokens, np.int32), np.zeros(len(tokens), np.bool_), media)


def pairs(model: Decoder, count: int = 6) -> list[Pair]:
    token = model.senses["vision"].token
    made = []
    for k in range(count):
        shown = image(k)
        item = row([token] * shown.num_tokens + [1], Media(images=(shown,)))
        made.append(Pair(item, row([20 + k, *[30] * (k % 3), 1])))
    return made


def test_in_pieces_it_is_the_same():
    random = torch.Generator().manual_seed(0)
    a_PD, b_PD = (torch.randn(7, 5, generator=random, requires_grad=True) for _ in range(2))
    labels_P, similarity = torch.tensor([0, 1, 2, 3, 1, 5, 0]), Similarity(CONFIG)
    results = []
    for chunk in (7, 3, 1):
        loss = sigmoid_loss(a_PD, b_PD, labels_P, similarity, chunk=chunk)
        learnt = [a_PD, b_PD, *similarity.parameters()]
        results.append([loss, *torch.autograd.grad(loss, learnt)])
    for pieces in results[1:]:
        for a, b in zip(results[0], pieces, strict=True):
            torch.testing.assert_close(a, b)


def test_it_is_the_loss_of_the_paper():
    a_PD, b_PD = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = sigmoid_loss(a_PD, b_PD, torch.arange(2), Similarity(CONFIG), chunk=8)
    logits = [10 * 1.0 - 10, 10 * 0.6 - 10, 10 * 0.0 - 10, 10 * 0.8 - 10]
    signs = [1, -1, -1, 1]
    expected = sum(math.log1p(math.exp(-s * x)) for s, x in zip(signs, logits, strict=True))
    assert abs(loss.item() - expected) < 1e-5


def test_recall():
    a_PD = torch.eye(3)
    b_PD = torch.tensor([[0.9, 0.1, 0.0], [0.95, 0.3, 0.0], [0.0, 0.0, 1.0]])
    assert recall_at(a_PD, b_PD, torch.tensor([0, 1, 2]), k=1) == pytest.approx(2 / 3)
    assert recall_at(a_PD, b_PD, torch.tensor([0, 0, 2]), k=1) == 1.0
    assert recall_at(a_PD, b_PD, torch.tensor([0, 1, 2]), k=2) == 1.0
    for chunk in (1, 2):
        assert recall_at(a_PD, b_PD, torch.tensor([0, 1, 2]), k=1, chunk=chunk) == pytest.approx(
            2 / 3
        )


def test_a_row_is_embedded_alike_alone_and_in_a_batch(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), MODALITIES[0]).eval()
    made = pairs(model)
    with torch.no_grad():
        together = embed(model, pair_batch(made))
        alone = torch.cat([embed(model, pair_batch([each])) for each in made])
    torch.testing.assert_close(together[:6], alone[0::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[6:], alone[1::2], atol=1e-5, rtol=0)


def test_it_learns_and_resumes_exactly(tiny_model: Callable[..., Decoder], tmp_path: Path):
    optim, results = OptimConfig(adam_lr=3e-3), []
    for name, stops in (("unbroken", (30,)), ("broken", (12, 30))):
        for steps in stops:
            model = taught(tiny_model(), MODALITIES[0])
            objective = ContrastiveObjective(model, pairs(model, 12), CONFIG, seed=0)
            train_in(tmp_path / name, model, objective, optim=optim, steps=steps)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rows = metrics_of(tmp_path / "unbroken")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_what_cannot_be_done_says_so(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), MODALITIES[0])
    with pytest.raises(DataError, match="5 pairs, and a step takes 6"):
        ContrastiveObjective(model, pairs(model, 5), CONFIG, seed=0)
    with pytest.raises(ConfigError, match="one process"):
        ContrastiveObjective(model, pairs(model), CONFIG, seed=0, rank=Rank(0, 2))
