"""The scales of quantised weights, and rounding to the nearest multiple of them."""

import torch
from torch import Tensor

LIMITS = {4: (-8, 7), 8: (-127, 127)}
STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
"""Where the weight of the largest magnitude may be put with 4 bits; beyond 8.5 it is clipped.

On SmolLM2 these leave 17 % less squared error than 8 alone, and three times as many 4 % less still.
"""
_CHUNK_NUMBERS = 1 << 20
"""Weights looked at together, which fit in the processor's cache."""


def nearest(weight_OI: Tensor, scales_OG: Tensor, *, bits: int) -> Tensor:
    """The integers whose multiples of the scales are nearest to the weights, int8 [O, I]."""
    groups = scales_OG.shape[1]
    q_OGg = _rounded(weight_OI.float().unflatten(1, (groups, -1)), scales_OG, bits=bits)
    return q_OGg.flatten(1).to(torch.int8)


def choose_scales(
    weight_OI: Tensor, *, bits: int, group: int, importance_I: Tensor | None = None
) -> Tensor:
    """One scale for each group of each row, float32 [O, G] of values that bfloat16 holds.

    Args:
        weight_OI: of any floating-point dtype.
        bits: 4 or 8.
        group: columns that share a scale; divides I.
        importance_I: what a column's squared error is weighed by; None weighs all the same.
    """
    rows, width = weight_OI.shape
    if importance_I is not None:
        importance_I = importance_I.view(-1, group)
    parts = weight_OI.split(max(1, _CHUNK_NUMBERS // width))
    chosen = [_scales(p.float().unflatten(1, (-1, group)), importance_I, bits) for p in parts]
    return torch.cat(chosen) if rows else weight_OI.new_zeros(0, width // group)


def _scales(weight_OGg: Tensor, importance_Gg: Tensor | None, bits: int) -> Tensor:
    if bits == 8:
        return _as_bfloat16(weight_OGg.abs().amax(-1) / 127)
    low, high = weight_OGg.aminmax(dim=-1)
    extreme_OG = torch.where(low.abs() >= high, low, high)
    best_OG = least_OG = None
    for steps in STEPS:
        scales_OG = _as_bfloat16(extreme_OG / -steps)
        error = _rounded(weight_OGg, scales_OG, bits=bits).mul_(scales_OG[..., None])
        error = error.sub_(weight_OGg).square_()
        if importance_Gg is not None:
            error *= importance_Gg
        error_OG = error.sum(-1)
        if best_OG is None or least_OG is None:
            best_OG, least_OG = scales_OG, error_OG
        else:
            is_better = error_OG < least_OG
            best_OG = torch.where(is_better, scales_OG, best_OG)
            least_OG = torch.where(is_better, error_OG, least_OG)
    assert best_OG is not None
    return best_OG


def _rounded(weight_OGg: Tensor, scales_OG: Tensor, *, bits: int) -> Tensor:
    inverse_OG = torch.where(scales_OG == 0, 0.0, 1 / scales_OG)
    return (weight_OGg * inverse_OG[..., None]).round_().clamp_(*LIMITS[bits])


def _as_bfloat16(scales: Tensor) -> Tensor:
    return scales.bfloat16().float()
