"""Several low-rank updates in one grouped product: rows sorted by adapter meet stacked weights.

Where the rows of a batch run on different adapters, two grouped products serve them all, however
many adapters there are and however uneven their shares. Adapters of smaller rank are filled up with
zeros, which add nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED_BYTES = 16
"""What torch's grouped product wants the rows of every operand to be a multiple of."""
RANK_STEP = 8
"""Ranks are filled up to a multiple of this, which is aligned for numbers of 16 bits and more."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """One adapter: the update is `scale * B(A(x))`."""

    a_RD: Tensor
    b_OR: Tensor
    scale: float


def grouped_update(x_NTD: Tensor, adapters: Sequence[Factors], counts: Sequence[int]) -> Tensor:
    """The update of every row by its adapter, [N, T, out] from [N, T, D].

    The first `counts[0]` rows belong to the first adapter, and so on.
    """
    assert len(x_NTD) == sum(counts), (len(x_NTD), counts)
    product = _in_groups if _can_group(x_NTD, adapters[0]) else _one_by_one
    return product(x_NTD, adapters, counts)


def _can_group(x_NTD: Tensor, factors: Factors) -> bool:
    widths = (factors.a_RD.shape[1], factors.b_OR.shape[0])
    return (
        x_NTD.device.type in ("cpu", "cuda")
        and x_NTD.dtype == factors.a_RD.dtype
        and x_NTD.dtype in DTYPES
        and all(width * x_NTD.itemsize % ALIGNED_BYTES == 0 for width in widths)
        and not torch.is_autocast_enabled(x_NTD.device.type)
    )


def _in_groups(x_NTD: Tensor, adapters: Sequence[Factors], counts: Sequence[int]) -> Tensor:
    widest = max(len(factors.a_RD) for factors in adapters)
    rank = widest + -widest % RANK_STEP
    spare = [rank - len(factors.a_RD) for factors in adapters]
    a_ERD = torch.stack([F.pad(f.a_RD, (0, 0, 0, s)) for f, s in zip(adapters, spare, strict=True)])
    b_EOR = torch.stack([F.pad(f.b_OR, (0, s)) for f, s in zip(adapters, spare, strict=True)])
    rows = x_NTD.shape[1:-1].numel()
    ends = torch.tensor(counts, device=x_NTD.device).cumsum(0).mul(rows).int()
    inner = F.grouped_mm(x_NTD.flatten(0, -2), a_ERD.transpose(1, 2), offs=ends)
    inner = inner * _scales(inner, adapters, [count * rows for count in counts])
    return F.grouped_mm(inner, b_EOR.transpose(1, 2), offs=ends).view(*x_NTD.shape[:-1], -1)


def _scales(like: Tensor, adapters: Sequence[Factors], counts: Sequence[int]) -> Tensor | float:
    """What each row is to be multiplied by, [rows, 1], or one number for all."""
    scales = [factors.scale for factors in adapters]
    if len({*scales}) == 1:
        return scales[0]
    each = torch.tensor(scales, dtype=like.dtype, device=like.device)
    return each.repeat_interleave(torch.tensor(counts, device=like.device))[:, None]


def _one_by_one(x_NTD: Tensor, adapters: Sequence[Factors], counts: Sequence[int]) -> Tensor:
    """The same for any device, shape and dtype."""
    return torch.cat(
        [
            F.linear(F.linear(x, a_RD) * scale, b_OR)
            for x, (a_RD, b_OR, scale) in zip(x_NTD.split(list(counts)), adapters, strict=True)
        ]
    )
