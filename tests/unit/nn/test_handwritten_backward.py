"""Forward and backward written by hand, against automatic differentiation of the plain formula."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.nn.mlp import SwiGLU
from phikit.nn.norm import RMSNorm
from phikit.nn.rope import RopeTables, rope_tables, rotate


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_gradients(
    ours: Callable[[], Tensor], naive: Callable[[], Tensor], leaves: list[Tensor]
) -> None:
    results = []
    for function in (ours, naive):
        y = function()
        gradients = torch.autograd.grad((y * drawn(*y.shape, seed=7)).sum(), leaves)
        results.append((y, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rms_norm():
    norm = RMSNorm(24, eps=1e-5)
    norm.weight.data = drawn(24, seed=1)
    x = (drawn(3, 5, 24) * 3).requires_grad_()

    def naive() -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight

    assert_same_gradients(lambda: norm(x), naive, [x, norm.weight])


def test_rms_norm_of_nothing_is_nothing():
    norm = RMSNorm(8, eps=1e-5)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_rms_norm_takes_the_mean_in_float32():
    norm = RMSNorm(4096, eps=1e-5).to(torch.bfloat16)
    x = drawn(2, 4096).bfloat16()
    exact = x.double() * x.double().square().mean(-1, keepdim=True).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, atol=1e-6, rtol=2**-8)


def test_frozen_norm():
    norm = RMSNorm(8, eps=1e-5).requires_grad_(False)
    x = drawn(2, 8).requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None


def test_swiglu():
    mlp = SwiGLU(12, 20)
    x = drawn(2, 3, 12).requires_grad_()
    gate, up = mlp.gate_up_proj.weight.detach().chunk(2)

    def naive() -> Tensor:
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), mlp.down_proj.weight)

    assert_same_gradients(lambda: mlp(x), naive, [x, *mlp.parameters()])
    assert gate.shape == up.shape == (20, 12)


def tables(positions: list[int], *, rotary_dim: int, theta: float = 10_000.0) -> RopeTables:
    return rope_tables(
        torch.tensor([positions]),
        rotary_dim=rotary_dim,
        theta=theta,
        longrope=None,
        max_context=64,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("rotary_dim", [16, 12])
def test_rotate(rotary_dim: int):
    x = drawn(2, 5, 3, 16).requires_grad_()
    table = tables([0, 1, 2, 3, 9], rotary_dim=rotary_dim)
    half = rotary_dim // 2

    def naive() -> Tensor:
        a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
        cos, sin = table
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    assert_same_gradients(lambda: rotate(x, table), naive, [x])
