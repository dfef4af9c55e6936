"""Feed-forward blocks: SwiGLU (Shazeer, 2020), and those of Phi-1 to Phi-2 and of Phi-3-small.

SwiGLU has gate and up fused in one matrix, gate rows first. Its backward pass is written by hand so
that both halves of the gradient land in one tensor; the composed one fills and adds two zero-padded
copies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phikit.nn import kernels
from phikit.nn.linear import Linear


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward(torch.mul(grad, up), gate, grad_input=grad_gate)
        return grad_gate_up


def gated_silu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dimension, gate first."""
    if kernels.ready(gate_up):
        return kernels.gated_silu(gate_up)
    return _GatedSilu.apply(gate_up)  # pyright: ignore[reportReturnType]


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; the layout of Phi-3 checkpoints."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(d_model, 2 * d_mlp, bias=False)
        self.down_proj = Linear(d_mlp, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_up_proj(x_BTD)))


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with biases, GELU in its tanh form ("gelu_new"); Phi-1 to Phi-2."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_mlp)
        self.down_proj = Linear(d_mlp, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate="tanh"))


class ClampedGEGLU(nn.Module):
    """`down(quick_gelu(gate) * (linear + 1))` with biases, both clamped at `limit`; Phi-3-small.

    The rows of `up_proj` alternate: gate 0, linear 0, gate 1, linear 1, ... The gate is clamped
    from above alone; quick_gelu(z) is z * sigmoid(1.702 z) (Hendrycks & Gimpel, 2016).
    """

    def __init__(self, d_model: int, d_mlp: int, *, limit: float) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, 2 * d_mlp)
        self.down_proj = Linear(d_mlp, d_model)
        self.limit = limit

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, linear_BTF = self.up_proj(x_BTD).unflatten(-1, (-1, 2)).unbind(-1)
        gate_BTF = gate_BTF.clamp(max=self.limit)
        linear_BTF = linear_BTF.clamp(-self.limit, self.limit)
        return self.down_proj(gate_BTF * (1.702 * gate_BTF).sigmoid() * (linear_BTF + 1))
