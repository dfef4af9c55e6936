"""SwiGLU feed-forward block (Shazeer, 2020) with gate and up fused in one matrix, gate rows first.

The backward pass is written by hand so that both halves of the gradient land in one tensor; the
composed one fills and adds two zero-padded copies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; the layout of Phi-3 checkpoints."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed_BTF: Tensor = _GatedSilu.apply(self.gate_up_proj(x_BTD))  # pyright: ignore
        return self.down_proj(mixed_BTF)
