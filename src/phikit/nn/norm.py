"""Root-mean-square norm (Zhang & Sennrich, 2019), the norm of every dense Phi model.

The backward pass is written by hand: on CPU the composed one runs about fifteen small operations
where seven suffice, and in a small model they cost as much as the matrix products.
"""

from typing import Any

import torch
from torch import Tensor, nn

from phikit.nn import kernels


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = mean_square.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = torch.mul(x, scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mul(unit, grad).flatten(0, -2).sum(0).to(weight.dtype)
        weighted = torch.mul(grad, weight)
        projection = torch.mul(unit, weighted).mean(-1, keepdim=True)
        grad_x = unit.mul_(projection).neg_().add_(weighted).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; mean square in float32 or wider, result in the type of `x`."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        if kernels.ready(x_BTD, self.weight) and x_BTD.dtype == self.weight.dtype:
            return kernels.rms_norm(x_BTD, self.weight, self.eps)
        return _RMSNorm.apply(x_BTD, self.weight, self.eps)  # pyright: ignore[reportReturnType]
