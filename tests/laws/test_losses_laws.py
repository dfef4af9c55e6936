"""Chunked log-probabilities against the plain formula, values and gradients."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phikit.nn import losses
from phikit.nn.losses import linear_cross_entropy, token_log_probs_and_entropy

VOCABULARY = 53


class Inputs(NamedTuple):
    x_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor


def inputs(count: int, *, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 16, generator=generator).mul(0.4).to(dtype).requires_grad_()
    return Inputs(x, weight, torch.randint(0, VOCABULARY, (count,), generator=generator))


def naive(given: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (given.x_ND @ given.weight_VD.T).float() / temperature
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, given.targets_N[:, None])[:, 0], entropy


@pytest.fixture(params=["one chunk", "chunks of 3"])
def chunked(request, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * VOCABULARY)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_values_and_gradients(count: int, temperature: float):
    given = inputs(count)
    log_probs, entropy = token_log_probs_and_entropy(*given, temperature=temperature)
    expected, expected_entropy = naive(given, temperature)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-6)
    assert not entropy.requires_grad

    outer = torch.randn(count, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((log_probs * outer).sum(), [given.x_ND, given.weight_VD])
    theirs = torch.autograd.grad((expected * outer).sum(), [given.x_ND, given.weight_VD])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunked")
def test_cross_entropy(chunked: None):
    given = inputs(11)
    expected = torch.nn.functional.cross_entropy(
        given.x_ND @ given.weight_VD.T, given.targets_N, reduction="none"
    )
    torch.testing.assert_close(linear_cross_entropy(*given), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.usefixtures("chunked")
def test_bfloat16_differs_by_its_rounding_alone():
    given = inputs(40, dtype=torch.bfloat16)
    log_probs, _ = token_log_probs_and_entropy(*given)
    exact = Inputs(given.x_ND.float(), given.weight_VD.float(), given.targets_N)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, naive(exact, 1.0)[0], atol=0.1, rtol=0)
    ours = torch.autograd.grad(log_probs.sum(), [given.x_ND, given.weight_VD])
    theirs = torch.autograd.grad(naive(exact, 1.0)[0].sum(), [given.x_ND, given.weight_VD])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


def test_no_tokens():
    given = inputs(0)
    log_probs, entropy = token_log_probs_and_entropy(*given)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert given.weight_VD.grad is not None
    assert not given.weight_VD.grad.any()


def test_a_frozen_head_gets_no_gradient():
    given = inputs(5)
    weight = given.weight_VD.detach()
    log_probs, _ = token_log_probs_and_entropy(given.x_ND, weight, given.targets_N)
    log_probs.sum().backward()
    assert weight.grad is None
    assert given.x_ND.grad is not None


def test_extreme_logits_stay_finite():
    x = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    log_probs, entropy = token_log_probs_and_entropy(x, weight, torch.tensor([0, 0]))
    assert log_probs.tolist() == [0.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0]
    log_probs.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
