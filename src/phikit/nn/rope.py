"""Rotary position embedding (Su et al., 2021): half-split, partial, LongRoPE (Ding et al., 2024).

The first `rotary_dim` channels of a head are rotated in pairs (i, i + rotary_dim/2); the rest pass
through. LongRoPE divides each frequency by a learnt factor and scales cos and sin by one constant;
which of its two factor sets applies depends on the last position of the row, so the tables are
computed once per forward pass and handed to every layer. (transformers decides by the longest row
of a batch; a row's numbers here do not depend on its neighbours.)
"""

import math
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from phikit.base.config import Config
from phikit.nn import kernels


class LongRope(Config):
    """LongRoPE constants of a checkpoint; both factor lists have rotary_dim / 2 entries."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_context: int = Field(ge=2)
    """Context length before extension; the long factors apply from `original_context + 1` on."""
    short_mscale: PositiveFloat | None = None
    long_mscale: PositiveFloat | None = None
    """What mixture-of-experts checkpoints scale cos and sin by, in place of the usual factor."""


class RopeTables(NamedTuple):
    """cos and sin, each [B or 1, T, 1, rotary_dim / 2]."""

    cos: Tensor
    sin: Tensor


def attention_factor(longrope: LongRope | None, max_context: int) -> float:
    """LongRoPE's factor on cos and sin: sqrt(1 + ln s / ln original), s the extension."""
    if longrope is None or max_context <= longrope.original_context:
        return 1.0
    stretch = max_context / longrope.original_context
    return math.sqrt(1 + math.log(stretch) / math.log(longrope.original_context))


def rope_tables(
    positions_BT: Tensor,
    *,
    ends_B: Tensor | None = None,
    rotary_dim: int,
    theta: float,
    longrope: LongRope | None,
    max_context: int,
    dtype: torch.dtype,
) -> RopeTables:
    """Cosines and sines for the given positions, computed in float32 and cast to `dtype` last.

    LongRoPE's factors follow from `ends_B`, the last position of each row's sequence, by default
    the row's own last.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=positions_BT.device).float() / rotary_dim
    frequencies = theta**exponents
    scale = attention_factor(longrope, max_context)
    if longrope is not None:
        ends_B = positions_BT.amax(-1) if ends_B is None else ends_B
        is_long_B111 = (ends_B >= longrope.original_context)[:, None, None, None]
        short, long = (
            torch.tensor(factors, device=positions_BT.device) * frequencies
            for factors in (longrope.short_factor, longrope.long_factor)
        )
        frequencies = torch.where(is_long_B111, long, short)
        if longrope.short_mscale is not None and longrope.long_mscale is not None:
            scale = torch.where(is_long_B111, longrope.long_mscale, longrope.short_mscale)
    angles_BTH = positions_BT[..., None, None].float() * (1.0 / frequencies)
    return RopeTables((angles_BTH.cos() * scale).to(dtype), (angles_BTH.sin() * scale).to(dtype))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, direction=-1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    half = cos.shape[-1]
    parts = [half, half, x.shape[-1] - 2 * half]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b, rest), (out_a, out_b, out_rest) = x.split(parts, dim=-1), out.split(parts, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)
    out_rest.copy_(rest)
    return out


def rotate(x_BTNH: Tensor, tables: RopeTables) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` channels of every head; the rest pass through.

    The gradient of a rotation is the rotation back, so the backward pass runs the same five
    operations in place of the fourteen that automatic differentiation would record.
    """
    if kernels.ready(x_BTNH, *tables) and x_BTNH.dtype == tables.cos.dtype:
        return kernels.rotate(x_BTNH, *tables)
    return _Rotate.apply(x_BTNH, tables.cos, tables.sin)  # pyright: ignore[reportReturnType]


def split_rotate(
    qkv_BTD: Tensor, tables: RopeTables, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, heads, H] of a fused projection, the first two rotated."""
    if kernels.ready(qkv_BTD, *tables) and qkv_BTD.dtype == tables.cos.dtype:
        return kernels.split_rotate(qkv_BTD, *tables, heads=heads, kv_heads=kv_heads)
    qkv = qkv_BTD.unflatten(-1, (heads + 2 * kv_heads, -1))
    qk, v_BTKH = qkv.split([heads + kv_heads, kv_heads], dim=2)
    q_BTNH, k_BTKH = rotate(qk, tables).split([heads, kv_heads], dim=2)
    return q_BTNH, k_BTKH, v_BTKH
