"""One grouped product is each adapter on its own rows, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.nn.low_rank import Factors, _can_group, add_update, grouped_update


def drawn(ranks: list[int], scales: list[float], width: int, out: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return [Factors(draw(r, width), draw(out, r), s) for r, s in zip(ranks, scales, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "scales", "width", "out", "counts", "is_grouped"),
    [
        ([4, 4], [2.0, 2.0], 16, 24, [2, 3], True),
        ([4, 6, 17], [2.0, 0.5, 1.0], 16, 24, [1, 4, 2], True),
        ([3, 5], [1.0, 2.0], 16, 24, [5, 0], True),
        ([4, 6], [2.0, 0.5], 15, 24, [2, 2], False),
        ([4, 6], [2.0, 0.5], 16, 10, [2, 2], False),
    ],
)
def test_it_is_each_adapter_on_its_own_rows(ranks, scales, width, out, counts, is_grouped: bool):
    adapters = drawn(ranks, scales, width, out)
    x = torch.randn(sum(counts), 7, width, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    assert _can_group(x, adapters[0]) == is_grouped
    found = grouped_update(x, adapters, counts)
    rows, start = [], 0
    for (a_RD, b_OR, scale), count in zip(adapters, counts, strict=True):
        rows.append(F.linear(F.linear(x[start : start + count], a_RD), b_OR) * scale)
        start += count
    expected = torch.cat(rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    leaves = [x, *(factor for a_RD, b_OR, _ in adapters for factor in (a_RD, b_OR))]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_rows_do_not_see_other_adapters():
    """To the bit: another adapter's weights and rank are nobody else's business."""
    first, second = drawn([4, 6], [1.0, 2.0], 16, 24)
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(2))
    before = grouped_update(x, [first, second], [2, 3])
    after = grouped_update(x, [first, Factors(second.a_RD * 3, second.b_OR, 7.0)], [2, 3])
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2:], after[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "counts"), [([4], [5]), ([4, 6, 17], [1, 4, 2]), ([3, 5], [5, 0])]
)
def test_added_in_place_it_is_the_same(ranks: list[int], counts: list[int], dtype: torch.dtype):
    """Forward and backward, for whatever needs a gradient."""
    scales = [0.5, 2.0, 1.0][: len(ranks)]
    adapters = [
        Factors(a.detach().to(dtype).requires_grad_(), b.detach().to(dtype).requires_grad_(), s)
        for a, b, s in drawn(ranks, scales, 16, 24)
    ]
    generator = torch.Generator().manual_seed(2)
    x, y = (
        torch.randn(sum(counts), 7, width, generator=generator).to(dtype).requires_grad_()
        for width in (16, 24)
    )
    leaves = [x, y, *(factor for a_RD, b_OR, _ in adapters for factor in (a_RD, b_OR))]
    found = add_update(1 * y, x, adapters, counts)
    expected = y + grouped_update(x, adapters, counts)
    atol, rtol = (1e-12, 1e-12) if dtype == torch.float64 else (0.5, 0.02)
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    weights = torch.randn(found.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    for ours, theirs in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    frozen = [Factors(a.detach(), b, s) for a, b, s in adapters]
    alone = add_update(1 * y.detach(), x.detach(), frozen, counts)
    [of_first_b] = torch.autograd.grad((alone * weights).sum(), [frozen[0].b_OR])
    assert torch.equal(of_first_b, gradients[3])
