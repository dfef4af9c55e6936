"""Low-rank updates: several in one grouped product, or added in place to what the base computed.

Where the rows of a batch run on different adapters, two grouped products serve them all, however
many adapters there are and however uneven their shares. Adapters of smaller rank are filled up with
zeros, which add nothing.

Where the rows of each adapter lie together and every row has one, nothing has to be gathered: the
products add to the base's output, and a backward pass written by hand takes half of the time that
an adapter costs otherwise (CPU, bfloat16).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    is_grouped = len(adapters) > 1 and _can_group(x_NTD, adapters[0])
    product = _in_groups if is_grouped else _one_by_one
    return product(x_NTD, adapters, counts)


def add_update(
    y_NTO: Tensor, x_NTD: Tensor, adapters: Sequence[Factors], counts: Sequence[int]
) -> Tensor:
    """`y_NTO`, which is contiguous, plus `grouped_update` of the other arguments, in its memory."""
    assert y_NTO.is_contiguous(), y_NTO.stride()
    is_alike = y_NTO.dtype == x_NTD.dtype == adapters[0].a_RD.dtype
    is_plain = is_alike and not torch.is_autocast_enabled(x_NTD.device.type)
    if is_plain and (len(adapters) == 1 or x_NTD.device.type == "cpu"):
        weights = [weight for a_RD, b_OR, _ in adapters for weight in (a_RD, b_OR)]
        scales = [factors.scale for factors in adapters]
        return _Added.apply(y_NTO, x_NTD, counts, scales, *weights)  # pyright: ignore[reportReturnType]
    return y_NTO.add_(grouped_update(x_NTD, adapters, counts))


class _Added(torch.autograd.Function):
    """Adapter by adapter, on its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NTO: Tensor,
        x_NTD: Tensor,
        counts: Sequence[int],
        scales: Sequence[float],
        *weights: Tensor,
    ) -> Tensor:
        ctx.mark_dirty(y_NTO)
        inner = []
        parts = zip(y_NTO.split(list(counts)), x_NTD.split(list(counts)), strict=True)
        for k, (y, x) in enumerate(parts):
            inner.append(torch.mm(x.flatten(0, -2), weights[2 * k].t()).mul_(scales[k]))
            y.flatten(0, -2).addmm_(inner[-1], weights[2 * k + 1].t())
        ctx.counts, ctx.scales = list(counts), scales
        ctx.save_for_backward(x_NTD, *weights, *inner)
        return y_NTO

    @staticmethod
    def backward(ctx: Any, grad_NTO: Tensor) -> tuple[Tensor | None, ...]:
        x_NTD, *saved = ctx.saved_tensors
        weights, inner = saved[: 2 * len(ctx.counts)], saved[2 * len(ctx.counts) :]
        needed = ctx.needs_input_grad
        grads_x, grads = [], list[Tensor | None]()
        parts = zip(grad_NTO.split(ctx.counts), x_NTD.split(ctx.counts), strict=True)
        for k, (grad, x) in enumerate(parts):
            grad, x = grad.flatten(0, -2), x.flatten(0, -2)
            a_RD, b_OR = weights[2 * k : 2 * k + 2]
            grad_inner = torch.mm(grad, b_OR).mul_(ctx.scales[k])
            if needed[1]:
                grads_x.append(torch.mm(grad_inner, a_RD))
            grads.append(torch.mm(grad_inner.t(), x) if needed[4 + 2 * k] else None)
            grads.append(torch.mm(grad.t(), inner[k]) if needed[5 + 2 * k] else None)
        grad_x = torch.cat(grads_x).view(x_NTD.shape) if needed[1] else None
        return grad_NTO, grad_x, None, None, *grads


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
