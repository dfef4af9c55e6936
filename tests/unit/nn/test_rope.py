"""Rotary positions: what depends on distance alone, what passes through, LongRoPE's constants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phikit.nn.rope import LongRope, attention_factor, rope_tables, rotate

LONGROPE = LongRope(short_factor=(1.0, 1.0), long_factor=(1.0, 4.0), original_context=32)


def rotated(x: torch.Tensor, position: int, *, rotary_dim: int = 12) -> torch.Tensor:
    """A vector [H] at one position."""
    tables = rope_tables(
        torch.tensor([[position]]),
        rotary_dim=rotary_dim,
        theta=10_000.0,
        longrope=None,
        max_context=4096,
        dtype=torch.float32,
    )
    return rotate(x[None, None, None], tables)[0, 0, 0]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_scores_depend_on_distance_alone(m: int, n: int, shift: int):
    generator = torch.Generator().manual_seed(m + n)
    q, k = torch.randn(2, 16, generator=generator)
    score = rotated(q, m) @ rotated(k, n)
    shifted = rotated(q, m + shift) @ rotated(k, n + shift)
    torch.testing.assert_close(score, shifted, atol=1e-4, rtol=0)


def test_length_is_kept_and_the_rest_passes_through():
    x = torch.arange(16.0)
    y = rotated(x, 29)
    assert torch.equal(y[12:], x[12:])
    assert not torch.allclose(y[:12], x[:12])
    assert y.norm() == pytest.approx(float(x.norm()))
    assert torch.equal(rotated(x, 0), x)


def test_angles():
    """Channel pair i turns by position / theta^(2i / rotary_dim)."""
    x = torch.zeros(16)
    x[1] = 1.0
    y = rotated(x, 5)
    angle = 5 / 10_000 ** (2 / 12)
    assert float(y[1]) == pytest.approx(math.cos(angle))
    assert float(y[7]) == pytest.approx(math.sin(angle))


def test_attention_factor():
    assert attention_factor(None, 131072) == 1.0
    assert attention_factor(LONGROPE, 32) == 1.0
    phi4_mini = LONGROPE.model_copy(update={"original_context": 4096})
    assert attention_factor(phi4_mini, 131072) == pytest.approx(1.1902380714)


@pytest.mark.parametrize(("last", "is_long"), [(31, False), (32, True)])
def test_the_last_position_chooses_the_factors(last: int, is_long: bool):
    tables = rope_tables(
        torch.tensor([[1, last]]),
        rotary_dim=4,
        theta=100.0,
        longrope=LONGROPE,
        max_context=128,
        dtype=torch.float64,
    )
    scale = attention_factor(LONGROPE, 128)
    angle = 0.1 / 4 if is_long else 0.1
    assert float(tables.cos[0, 0, 0, 1]) == pytest.approx(scale * math.cos(angle), abs=1e-6)
    assert float(tables.sin[0, 0, 0, 0]) == pytest.approx(scale * math.sin(1.0), abs=1e-6)
