"""The quantised blocks of GGUF, written bit for bit as ggml defines them.

32 neighbours of a row are a block: a float16 scale d, then their integers q; a weight is q * d.

- Q8_0, 34 bytes: d = max|w| / 127; q in -127..127, a byte each.
- Q4_0, 18 bytes: d = w* / -8, where w* is the weight of the largest magnitude, with its sign; q in
  -8..7, kept as q + 8 in a nibble. Byte j holds weight j in its low nibble, weight j + 16 in the
  high one.

Weights that phikit has quantised (`nn.quantised`) are the same integers in groups of 32 or more, so
they become blocks without a second rounding (`transferred`).

Source: llama.cpp, `ggml/src/ggml-quants.c`, quantize_row_q8_0_ref and quantize_row_q4_0_ref.
"""

from typing import Literal

import torch
from torch import Tensor

from phikit.nn.quantised import PackedWeight, unpack

BLOCK = 32
Kind = Literal["q8_0", "q4_0"]
KINDS: dict[int, Kind] = {8: "q8_0", 4: "q4_0"}
"""The blocks for integers of so many bits."""


def quantised(weight_OI: Tensor, kind: Kind) -> Tensor:
    """Rows of weights, float32 [O, I], as rows of blocks, uint8 [O, bytes]; 32 divides I."""
    weight = weight_OI.unflatten(1, (-1, BLOCK))
    if kind == "q8_0":
        scales = weight.abs().amax(-1, keepdim=True) / 127
        return _bytes(_away_from_zero(weight * _inverse(scales)), scales, kind)
    first_largest = weight.abs().argmax(-1, keepdim=True)
    scales = weight.gather(-1, first_largest) / -8
    nibbles = (weight * _inverse(scales) + 8.5).trunc().clamp_(max=15)
    return _bytes(nibbles - 8, scales, kind)


def transferred(weight: PackedWeight, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of a packed matrix as integers, float32 [O, I], and a scale for each block [O, I / 32].

    To be written with `blocks`; a scale below float16's normal range (6e-5) is rounded there.
    """
    ones = torch.ones_like(weight.scales)
    q_OI = unpack(weight.packed, ones, shape=weight.shape, dtype=torch.float32)
    scales_OG = weight.scales.transpose(1, 2).flatten(0, 1)[: weight.shape[0]].float()
    repeats = weight.group // BLOCK
    return q_OI[rows], scales_OG[rows].repeat_interleave(repeats, dim=1)


def blocks(q_OI: Tensor, scales_OB: Tensor, kind: Kind) -> Tensor:
    """Integers and their scales as rows of blocks, uint8 [O, bytes]."""
    return _bytes(q_OI.unflatten(1, (-1, BLOCK)), scales_OB[..., None], kind)


def _bytes(q: Tensor, scales: Tensor, kind: Kind) -> Tensor:
    """Integers [O, B, 32] and scales [O, B, 1] as rows of bytes."""
    if kind == "q8_0":
        integers = q.to(torch.int8).view(torch.uint8)
    else:
        low, high = (q + 8).to(torch.uint8).split(BLOCK // 2, dim=-1)
        integers = low | high << 4
    return torch.cat((scales.half().view(torch.uint8), integers), -1).flatten(1)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)


def _away_from_zero(x: Tensor) -> Tensor:
    """Rounded to the nearest integer, halves away from zero, as C's `roundf` does."""
    size = x.abs()
    whole = size.floor()
    return (whole + (2 * (size - whole)).floor()).copysign(x)
